"""Settings of the scheduler: the step, the queue, the KV cache, fairness and speculation."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

from loraplex_server.config.declared import check
from loraplex_server.config.kinds import Count, OnOff, Seconds, Share, Size
from loraplex_server.config.setting import NOT_NEGATIVE, POSITIVE, Group, Range, Setting
from loraplex_server.core.request import MAX_SPECULATIVE_TOKENS

KvCacheDtype = Literal["auto", "fp8"]

_batching = partial(Setting, group=Group.BATCHING)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step, of the queue, and of the KV cache."""

    max_batch_tokens: Annotated[
        Count,
        _batching(
            help="tokens computed in one step",
            range=POSITIVE,
            unit="tokens",
            detail="Prefill and decode tokens together.",
        ),
    ] = 512
    max_num_requests: Annotated[
        Count, _batching(help="requests that run at once", range=POSITIVE, unit="requests")
    ] = 64
    max_scored_tokens: Annotated[
        Count,
        _batching(
            help="prompt tokens that get log-probabilities in one step",
            range=POSITIVE,
            unit="tokens",
            detail="Each needs a row of logits as wide as the vocabulary, so prompts that ask for "
            "log-probabilities are computed in smaller chunks.",
        ),
    ] = 128
    max_queue: Annotated[
        Count,
        _batching(
            help="requests that may wait; the server refuses more",
            range=POSITIVE,
            unit="requests",
            detail="It refuses them with `RESOURCE_EXHAUSTED`.",
        ),
    ] = 1024
    max_model_len: Annotated[
        Count,
        _batching(
            help="tokens of prompt and answer together; 0 is the model's own limit",
            range=NOT_NEGATIVE,
            unit="tokens",
        ),
    ] = 0
    gpu_memory_utilization: Annotated[
        Share,
        _batching(
            help="share of the GPU's memory that may be in use: by weights, steps, adapters, the KV cache, "
            "and by other programs",
            range=Range(above=0, most=1),
        ),
    ] = 0.9
    kv_cache_bytes: Annotated[
        Size,
        _batching(
            help="memory for the KV cache; 0 takes what is left on a GPU, what the requests need on a CPU",
            range=NOT_NEGATIVE,
            detail="On a CPU, 0 is enough for `--max-num-requests` requests of moderate length, within "
            "reason.",
        ),
    ] = 0
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        _batching(
            help="type of the KV cache; auto is the type of the activations, fp8 saves memory and is less "
            "exact",
            detail="fp8 is e4m3.",
        ),
    ] = "auto"
    kv_block_size: Annotated[
        Count, _batching(help="tokens in one block of the KV cache", range=POSITIVE, unit="tokens")
    ] = 16
    prefix_cache: Annotated[
        OnOff,
        _batching(
            help="keep the KV cache of prompts and answers, while there is room, for requests that begin "
            "alike"
        ),
    ] = True
    speculative_tokens: Annotated[
        Count,
        _batching(
            help="most draft tokens in a step for requests that do not say how many, up to "
            f"{MAX_SPECULATIVE_TOKENS}; 0 is no speculation",
            detail="Drafts come from the text of the request itself. Speculation does not change the "
            "answers.",
            range=Range(least=0, most=MAX_SPECULATIVE_TOKENS),
            unit="tokens",
        ),
    ] = 0
    speculation_max_load: Annotated[
        Share,
        _batching(
            help="while more than this share of --max-num-requests run, no request gets drafts",
            detail="With 0, no request ever gets drafts.",
            range=Range(least=0, most=1),
        ),
    ] = 0.5
    max_adapter_wait_s: Annotated[
        Seconds,
        _batching(
            name="max_adapter_wait",
            help="once a request has waited this long for room on the device, the server frees adapters in "
            "use, one by one",
            detail="A freed adapter gets no new requests until it can be evicted. The longer the wait, the "
            "more adapters are freed.",
        ),
    ] = 5.0
    fair_quantum: Annotated[
        Count,
        _batching(
            help="tokens that a tenant, and each adapter of a tenant, gets before the next one has its turn",
            range=POSITIVE,
            unit="tokens",
        ),
    ] = 512
    fair_aging_s: Annotated[
        Seconds,
        _batching(
            name="fair_aging",
            help="waiting time that counts as one quantum; a longer one is fairer, a shorter one is closer "
            "to first come, first served",
            range=Range(above=0, below=math.inf),
        ),
    ] = 5.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def max_samples(self) -> int:
        """Most rows of a step after which a token is sampled."""
        return min(self.max_num_requests, self.max_batch_tokens)
