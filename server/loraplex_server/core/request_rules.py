"""The rules for the fields of a request, checked by both the API and the engine.

Each rule yields violations that name fields of `core.request.Request`; the API replaces these names with the
paths of its messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loraplex_server.core.errors import FieldViolation, InvalidArgumentError
from loraplex_server.core.request import MAX_SPECULATIVE_TOKENS, AdapterUse, Request, SamplingParams

# As in OpenAI's API.
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
# Beyond these, the penalty alone decides whether a token can be chosen.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0


class RequestLimits(NamedTuple):
    """Limits of one model and one server.

    Attributes:
        vocab_size: number of tokens of the base model; adapters may add more.
        max_model_len: most tokens of prompt and answer together.
        max_adapters: most adapters in one mix.
    """

    vocab_size: int
    max_model_len: int
    max_adapters: int


def check_request(request: Request, limits: RequestLimits) -> None:
    """Checks all fields of a request.

    Raises:
        InvalidArgumentError: with one violation for each field that breaks a rule.
    """
    found = [
        *prompt_violations(request.prompt_token_ids, limits),
        *mix_violations(request.adapters, limits),
        *sampling_violations(request.sampling),
        *speculation_violations(request.speculative_tokens),
    ]
    if repeated(request.adapters):
        found.append(FieldViolation("adapters", "one adapter is named twice; add the weights up instead"))
    if found:
        raise InvalidArgumentError.fields(found)


def prompt_violations(token_ids: Sequence[int], limits: RequestLimits) -> Iterator[FieldViolation]:
    """Rule: a prompt has at least one token, no negative ids, and leaves room for one more token."""
    if not token_ids:
        yield FieldViolation("prompt", "is empty; give at least one token")
    elif min(token_ids) < 0:
        yield FieldViolation("prompt", f"has a token id outside the vocabulary of {limits.vocab_size}")
    if len(token_ids) >= limits.max_model_len:
        yield FieldViolation("prompt", too_long(len(token_ids), limits))


def mix_violations(uses: Sequence[AdapterUse], limits: RequestLimits) -> Iterator[FieldViolation]:
    """Rule: a mix has at most `max_adapters` adapters, each with a finite weight."""
    if len(uses) > limits.max_adapters:
        yield FieldViolation(
            "adapters", f"{len(uses)} are more than the {limits.max_adapters} a request may name"
        )
        return
    for index, use in enumerate(uses):
        if not math.isfinite(use.weight):
            yield FieldViolation(f"adapters[{index}].weight", "has to be finite")


def repeated(uses: Sequence[AdapterUse]) -> list[int]:
    """Positions in a mix that repeat an earlier adapter's name. A valid mix has none."""
    names = [use.name for use in uses]
    return [index for index, name in enumerate(names) if name in names[:index]]


def sampling_violations(sampling: SamplingParams) -> Iterator[FieldViolation]:
    """Rule: each sampling parameter is in its range."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        yield FieldViolation("sampling.temperature", "has to be 0 (greedy) or more, and finite")
    if not 0 < sampling.top_p <= 1:
        yield FieldViolation("sampling.top_p", "has to be above 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        yield FieldViolation("sampling.min_p", "has to be 0 to 1")
    low, high = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    # 0.01 as a float32 is slightly less than 0.01.
    if not low * (1 - 1e-6) <= sampling.repetition_penalty <= high:
        yield FieldViolation("sampling.repetition_penalty", f"has to be from {low:g} to {high:g}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -MAX_PENALTY <= getattr(sampling, name) <= MAX_PENALTY:
            yield FieldViolation(f"sampling.{name}", f"has to be {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    if not all(-MAX_BIAS <= value <= MAX_BIAS for _, value in sampling.logit_bias):
        yield FieldViolation("sampling.logit_bias", f"values have to be {-MAX_BIAS:g} to {MAX_BIAS:g}")


def speculation_violations(speculative_tokens: int | None) -> Iterator[FieldViolation]:
    """Rule: a request asks for at most `MAX_SPECULATIVE_TOKENS` draft tokens in a step."""
    if speculative_tokens is not None and speculative_tokens > MAX_SPECULATIVE_TOKENS:
        yield FieldViolation(
            "speculative_tokens", f"{speculative_tokens} is more than {MAX_SPECULATIVE_TOKENS}"
        )


def too_long(num_tokens: int, limits: RequestLimits) -> str:
    """The description of the violation by a prompt that leaves no room for an answer."""
    return (
        f"has {num_tokens} tokens, which leaves no room to generate: prompt and answer together "
        f"may have {limits.max_model_len}"
    )
