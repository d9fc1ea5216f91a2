"""Answers of `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.answers.whole import WholeAnswer
from loraplex_server.api.http.formats import Heading, finite, wants_usage
from loraplex_server.api.http.schema import (
    AnswerMessage,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    TokenAlternative,
    TokenEntry,
    Usage,
)
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.wire.messages import TokenLogprobs

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ChatFormat:
    """Of `/v1/chat/completions`; the answers' text is the tokenizer's."""

    def __init__(self, body: ChatBody, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._token_text = tokenizer.token_text
        self._wants_logprobs = bool(body.logprobs)
        self._usage = None if wants_usage(body) else msgspec.UNSET
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
            logprob=finite(entry.logprob),
            bytes=_bytes(text),
            top_logprobs=[
                TokenAlternative(other, finite(logprob), _bytes(other)) for other, logprob in alternatives
            ],
        )


def _bytes(text: str) -> list[int] | None:
    return None if _REPLACEMENT in text else list(text.encode())
