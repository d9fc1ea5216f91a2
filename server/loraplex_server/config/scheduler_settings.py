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
        Count, _batching(help="requests running at once", range=POSITIVE, unit="requests")
    ] = 64
    max_scored_tokens: Annotated[
        Count,
        _batching(
            help="tokens of prompts that get log-probabilities in one step",
            range=POSITIVE,
            unit="tokens",
            detail="Each takes a row of logits as wide as the vocabulary. Prompts that ask for "
            "log-probabilities are therefore computed in smaller chunks.",
        ),
    ] = 128
    max_queue: Annotated[
        Count,
        _batching(
            help="requests that may wait; more are refused",
            range=POSITIVE,
            unit="requests",
            detail="They are refused with `RESOURCE_EXHAUSTED`.",
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
            help="share of the GPU's memory for weights, steps, adapters and the KV cache, and for whatever "
            "else is on it",
            range=Range(above=0, most=1, complaint="is no share above 0 and up to 1"),
        ),
    ] = 0.9
    kv_cache_bytes: Annotated[
        Size,
        _batching(
            help="memory of the KV cache; 0 takes what is left on a GPU, what is needed on a CPU",
            range=NOT_NEGATIVE,
            detail="On a CPU, 0 takes what `--max-num-requests` of moderate length need, within reason.",
        ),
    ] = 0
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        _batching(
            help="type of the KV cache; auto is that of the activations, fp8 saves room and is less exact",
            detail="fp8 is e4m3.",
        ),
    ] = "auto"
    kv_block_size: Annotated[
        Count, _batching(help="tokens in a block of the KV cache", range=POSITIVE, unit="tokens")
    ] = 16
    prefix_cache: Annotated[
        OnOff,
        _batching(help="keep the KV of prompts and answers, as room allows, for requests that begin alike"),
    ] = True
    speculative_tokens: Annotated[
        Count,
        _batching(
            help="tokens guessed in a step from a request's own text, where it does not say; 0 to "
            f"{MAX_SPECULATIVE_TOKENS}. Answers are the same",
            range=Range(
                least=0, most=MAX_SPECULATIVE_TOKENS, complaint=f"is none of 0 to {MAX_SPECULATIVE_TOKENS}"
            ),
            unit="tokens",
        ),
    ] = 0
    speculation_max_load: Annotated[
        Share,
        _batching(
            help="share of --max-num-requests beyond which running requests get no guesses; 0 is never any",
            range=Range(least=0, most=1, complaint="is no share from 0 to 1"),
        ),
    ] = 0.5
    max_adapter_wait_s: Annotated[
        Seconds,
        _batching(
            name="max_adapter_wait",
            help="for a request that has waited so long for room on the device, adapters in use are freed "
            "one by one",
            detail="Such an adapter gets no new requests until it can be evicted. The longer the wait, the "
            "more adapters are freed.",
        ),
    ] = 5.0
    fair_quantum: Annotated[
        Count,
        _batching(
            help="tokens of a tenant, and of an adapter within it, before it is the next one's turn",
            range=POSITIVE,
            unit="tokens",
        ),
    ] = 512
    fair_aging_s: Annotated[
        Seconds,
        _batching(
            name="fair_aging",
            help="waiting time that counts as much as a quantum not given: more is fairer, less nearer to "
            "first come first served",
            range=Range(above=0, below=math.inf, complaint="is no positive number"),
        ),
    ] = 5.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def max_samples(self) -> int:
        """Most rows of a step after which a token is sampled."""
        return min(self.max_num_requests, self.max_batch_tokens)
