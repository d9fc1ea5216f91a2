"""How the pieces of answers look to OpenAI's clients: whole, and as the events of a stream."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.answers.whole import WholeAnswer
from loraplex_server.api.http.schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionTokensDetails,
    Delta,
    PromptTokensDetails,
    TokenAlternative,
    TokenEntry,
    Usage,
)
from loraplex_server.api.requests.prompts import Prompt
from loraplex_server.api.text.detokenizer import token_offsets
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.wire.messages import TokenLogprobs

TokenText = Callable[[int], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# JSON has no infinity; OpenAI's API says this of what is all but impossible.
_LEAST_LOGPROB = -9999.0


@dataclasses.dataclass(frozen=True)
class Heading:
    """What every answer and every event of one request has."""

    request_id: str
    model: str
    fingerprint: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class Format(Protocol):
    """The looks of one kind of answer."""

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> bytes:
        """The body with every answer, in order."""

    def events(self, index: int, piece: Piece, end: End | None) -> Iterator[bytes]:
        """What to send for a piece of answer `index`; nothing where it says nothing yet."""

    def usage_event(self, usage: Usage) -> bytes:
        """The last event, where it was asked for."""


class CompletionFormat:
    """Of `/v1/completions`.

    Args:
        num_choices: answers to each prompt; the first of them has its log-probabilities.
        wants_logprobs: entries were asked for, with so many alternatives each.
        null_usage: events say that their usage is null, as they do when the last one has it.
        echoes: the answers begin with their prompts.
    """

    def __init__(
        self,
        heading: Heading,
        tokenizer: Tokenizer,
        num_choices: int,
        wants_logprobs: int | None,
        null_usage: bool,
        *,
        echoes: bool = False,
    ) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._token_text = tokenizer.token_text
        self._num_choices = num_choices
        self._wants_logprobs = wants_logprobs
        self._usage = None if null_usage else msgspec.UNSET
        self._scored = echoes and wants_logprobs is not None
        # By the index of a prompt's first answer: its scores so far, what waits for all of them, and how many
        # those are.
        self._scores: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
        self._held: defaultdict[int, list[tuple[int, Piece, End | None]]] = defaultdict(list)
        self._wanted: dict[int, int] = {}
        # By index: the characters of the prompt.
        self._echoed: dict[int, int] = {}

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> bytes:
        choices = []
        for index, answer in enumerate(answers):
            prompt = answer.prompt
            scores = answers[self._first(index)].prompt_logprobs
            choices.append(
                CompletionChoice(
                    text=answer.text,
                    index=index,
                    logprobs=self._logprobs(answer.logprobs, answer.offsets, prompt, scores),
                    finish_reason=answer.finished.finish.reason.value,
                )
            )
        return self._encode(choices, usage)

    def events(self, index: int, piece: Piece, end: End | None) -> Iterator[bytes]:
        if not self._scored:
            yield from self._event(index, piece, end, ())
            return
        first = self._first(index)
        scores, held = self._scores[first], self._held[first]
        scores += piece.prompt_logprobs
        held.append((index, piece, end))
        if piece.prompt is not None:
            self._wanted[first] = len(piece.prompt.token_ids) - 1
        # A prompt is echoed in one piece, and so are its log-probabilities, for each of its answers.
        if len(scores) == self._wanted[first]:
            for each in held:
                yield from self._event(*each, scores)
            held.clear()

    def _event(
        self, index: int, piece: Piece, end: End | None, scores: Sequence[TokenLogprobs]
    ) -> Iterator[bytes]:
        prompt, before = piece.prompt, self._echoed.get(index, 0)
        if prompt is not None:
            self._echoed[index] = len(prompt.text)
        text = (prompt.text if prompt else "") + piece.text
        if not text and end is None and not piece.logprobs and prompt is None:
            return
        offsets = [before + offset for offset in piece.offsets]
        choice = CompletionChoice(
            text=text,
            index=index,
            logprobs=self._logprobs(piece.logprobs, offsets, prompt, scores),
            finish_reason=end.finish.reason.value if end else None,
        )
        yield self._encode([choice], self._usage)

    def _first(self, index: int) -> int:
        return index - index % self._num_choices

    def usage_event(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def _encode(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        heading = self._heading
        return msgspec.json.encode(
            Completion(
                id=f"cmpl-{heading.request_id}",
                created=heading.created,
                model=heading.model,
                choices=choices,
                system_fingerprint=heading.fingerprint,
                usage=usage,
            )
        )

    def _logprobs(
        self,
        entries: Sequence[TokenLogprobs],
        offsets: Sequence[int],
        prompt: Prompt | None,
        scores: Sequence[TokenLogprobs],
    ) -> CompletionLogprobs | None:
        """Those of the prompt, if there is one, and of the tokens after it; `offsets` are from its end."""
        if self._wants_logprobs is None:
            return None
        found: list[TokenLogprobs | None] = list(entries)
        token_ids = [entry.token_id for entry in entries]
        if prompt is not None:
            found = [None, *scores, *entries]
            token_ids = [*prompt.token_ids, *token_ids]
            end = len(prompt.text)
            own = token_offsets(self._tokenizer, prompt.token_ids)
            offsets = [*(min(offset, end) for offset in own), *(end + offset for offset in offsets)]
        return CompletionLogprobs(
            tokens=[self._token_text(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in found],
            top_logprobs=[None if entry is None else self._best(entry) for entry in found]
            if self._wants_logprobs
            else None,
            text_offset=list(offsets),
        )

    def _best(self, entry: TokenLogprobs) -> dict[str, float]:
        # Of tokens that look alike, the most probable.
        texts = [self._token_text(top.token_id) for top in entry.top]
        pairs = zip(texts, entry.top, strict=True)
        return {text: _finite(top.logprob) for text, top in reversed(list(pairs))}


class ChatFormat:
    """Of `/v1/chat/completions`; arguments as those of `CompletionFormat`."""

    def __init__(
        self, heading: Heading, token_text: TokenText, wants_logprobs: bool, null_usage: bool
    ) -> None:
        self._heading = heading
        self._token_text = token_text
        self._wants_logprobs = wants_logprobs
        self._usage = None if null_usage else msgspec.UNSET
        self._opened: set[int] = set()

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> bytes:
        heading = self._heading
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(answer.text),
                logprobs=self._logprobs(answer.logprobs),
                finish_reason=answer.finished.finish.reason.value,
            )
            for index, answer in enumerate(answers)
        ]
        return msgspec.json.encode(
            ChatCompletion(
                id=f"chatcmpl-{heading.request_id}",
                created=heading.created,
                model=heading.model,
                choices=choices,
                usage=usage,
                system_fingerprint=heading.fingerprint,
            )
        )

    def events(self, index: int, piece: Piece, end: End | None) -> Iterator[bytes]:
        if index not in self._opened:
            self._opened.add(index)
            opening = ChatChunkChoice(index, Delta(role="assistant", content=""))
            yield self._encode([opening], self._usage)
        if not piece.text and end is None and not piece.logprobs:
            return
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=piece.text) if piece.text else Delta(),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=end.finish.reason.value if end else None,
        )
        yield self._encode([choice], self._usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def _encode(self, choices: list[ChatChunkChoice], usage: Usage | msgspec.UnsetType | None) -> bytes:
        heading = self._heading
        return msgspec.json.encode(
            ChatChunk(
                id=f"chatcmpl-{heading.request_id}",
                created=heading.created,
                model=heading.model,
                choices=choices,
                system_fingerprint=heading.fingerprint,
                usage=usage,
            )
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        return ChatLogprobs([self._entry(entry) for entry in entries])

    def _entry(self, entry: TokenLogprobs) -> TokenEntry:
        text = self._token_text(entry.token_id)
        alternatives = [(self._token_text(top.token_id), top.logprob) for top in entry.top]
        return TokenEntry(
            token=text,
            logprob=_finite(entry.logprob),
            bytes=_bytes(text),
            top_logprobs=[
                TokenAlternative(other, _finite(logprob), _bytes(other)) for other, logprob in alternatives
            ],
        )


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


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _bytes(text: str) -> list[int] | None:
    return None if _REPLACEMENT in text else list(text.encode())
