"""Answers as OpenAI's clients read them: what both kinds of answers have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.answers.whole import WholeAnswer
from loraplex_server.api.http.schema import (
    CompletionTokensDetails,
    GenerationBody,
    PromptTokensDetails,
    Usage,
)

# JSON has no infinity; OpenAI's API gives this value for tokens that are all but impossible.
_LEAST_LOGPROB = -9999.0


@dataclasses.dataclass(frozen=True)
class Heading:
    """The fields that every answer and every event of one request has."""

    request_id: str
    model: str
    fingerprint: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class Format(Protocol):
    """The format of one kind of answer."""

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> bytes:
        """The body with every answer, in order."""

    def events(self, index: int, piece: Piece, end: End | None) -> Iterator[bytes]:
        """The events for a piece of answer `index`; none while there is nothing to say."""

    def usage_event(self, usage: Usage) -> bytes:
        """The last event, where it was asked for."""


def usage_of(ends: Sequence[End], num_choices: int) -> Usage:
    """Tokens of a request: each prompt's once, however many of `num_choices` answers it has."""
    prompt = sum(end.prompt_tokens for end in ends[::num_choices])
    completion = sum(end.completion_tokens for end in ends)
    times = [end.finish.times for end in ends[::num_choices]]
    cached = sum(each.cached_prompt_tokens for each in times if each is not None)
    every = [end.finish.times for end in ends if end.finish.times is not None]
    accepted = sum(each.accepted_tokens for each in every)
    wrong = sum(each.drafted_tokens for each in every) - accepted
    details = PromptTokensDetails(cached), CompletionTokensDetails(accepted, wrong)
    return Usage(prompt, completion, prompt + completion, *details)


def wants_usage(body: GenerationBody) -> bool:
    """True where the last event has the usage; the others then say that theirs is null."""
    return bool(body.stream and body.stream_options is not None and body.stream_options.include_usage)


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it."""
    return max(logprob, _LEAST_LOGPROB)
