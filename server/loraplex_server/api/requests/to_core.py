"""From checked messages of `loraplex.v1` to the server's own types."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from loraplex.v1 import adapters_pb2, generation_pb2
from loraplex_server.api.requests.bounds import DEFAULT_MAX_TOKENS
from loraplex_server.api.requests.enums import enum_text
from loraplex_server.api.requests.limits import Limits
from loraplex_server.core.composition import Composition
from loraplex_server.core.request import AdapterUse, Request, SamplingParams, Structure


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """All that a request needs to know beside its message.

    Attributes:
        prompt_token_ids: the prompt, tokenised.
        bad_words: the message's, tokenised.
        end_token_ids: end the answer like the model's own end-of-sequence tokens.
        tenant: whose call it is.
        deadline_s: `time.time()` after which the answer is of no use.
    """

    prompt_token_ids: Sequence[int]
    request_id: str
    tenant: str
    deadline_s: float | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    end_token_ids: tuple[int, ...] = ()


def to_request(message: generation_pb2.GenerateRequest, limits: Limits, around: Circumstances) -> Request:
    """The request that a checked message makes."""
    return Request(
        request_id=around.request_id,
        prompt_token_ids=tuple(around.prompt_token_ids),
        sampling=_sampling_around(message, limits, around),
        adapters=to_adapter_uses(message.adapters),
        tenant=around.tenant,
        priority=message.priority,
        deadline_s=around.deadline_s,
        cache_prefix=message.cache_prefix if message.HasField("cache_prefix") else True,
        structure=_structure(message.structure) if message.HasField("structure") else None,
        speculative_tokens=_given(message, "speculative_tokens"),
    )


def to_composition(message: adapters_pb2.RegisterCompositionRequest) -> Composition:
    """The composition that a checked message describes."""
    sign = enum_text(adapters_pb2.MajoritySign, message.majority_sign)
    return Composition(
        combination_type=enum_text(adapters_pb2.CombinationType, message.combination_type),
        members=to_adapter_uses(message.members),
        density=_given(message, "density"),
        majority_sign="total" if sign == "unspecified" else sign,
        svd_rank=_given(message, "svd_rank"),
        seed=message.seed,
    )


def to_sampling(message: generation_pb2.GenerateRequest, limits: Limits) -> SamplingParams:
    """The sampling parameters that a message gives; what it leaves open is the model's default."""
    sampling, stopping = message.sampling, message.stopping
    top_k = _or_default(sampling, limits, "top_k")
    return SamplingParams(
        temperature=_or_default(sampling, limits, "temperature"),
        # All of the vocabulary is no restriction.
        top_k=top_k if top_k < limits.rules.vocab_size else 0,
        top_p=_or_default(sampling, limits, "top_p"),
        min_p=_or_default(sampling, limits, "min_p"),
        repetition_penalty=_or_default(sampling, limits, "repetition_penalty"),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sampling.logit_bias.items()),
        seed=sampling.seed,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else DEFAULT_MAX_TOKENS,
        min_tokens=stopping.min_tokens,
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        logprobs=_given(message, "logprobs"),
        prompt_logprobs=_given(message, "prompt_logprobs"),
    )


def to_adapter_uses(uses: Sequence[Any]) -> tuple[AdapterUse, ...]:
    """The adapters of a mix, or the members of a composition."""
    return tuple(AdapterUse(use.adapter, use.weight if use.HasField("weight") else 1.0) for use in uses)


def _sampling_around(
    message: generation_pb2.GenerateRequest, limits: Limits, around: Circumstances
) -> SamplingParams:
    known = to_sampling(message, limits)
    max_tokens = min(known.max_tokens, limits.rules.max_model_len - len(around.prompt_token_ids))
    return msgspec.structs.replace(
        known,
        bad_words=around.bad_words,
        seed=known.seed if message.sampling.HasField("seed") else secrets.randbits(63),
        max_tokens=max_tokens,
        min_tokens=min(known.min_tokens, max_tokens),
        stop_token_ids=(*known.stop_token_ids, *(() if known.ignore_eos else around.end_token_ids)),
    )


def _structure(structure: generation_pb2.Structure) -> Structure:
    kind = structure.WhichOneof("kind") or ""
    if kind == "choice":
        return Structure(kind, choices=tuple(dict.fromkeys(structure.choice.texts)))
    return Structure(kind, "" if kind == "json_object" else getattr(structure, kind))


def _given(message: Any, field: str) -> Any:
    """The value of an optional field, None where it is not set."""
    return getattr(message, field) if message.HasField(field) else None


def _or_default(sampling: generation_pb2.SamplingParams, limits: Limits, field: str) -> Any:
    """The value of an optional field, that of the model's defaults where it is not set."""
    return getattr(sampling if sampling.HasField(field) else limits.defaults, field)
