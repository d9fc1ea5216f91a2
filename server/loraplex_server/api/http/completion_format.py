"""Answers of `POST /v1/completions`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.answers.whole import WholeAnswer
from loraplex_server.api.http.formats import Heading, finite, wants_usage
from loraplex_server.api.http.schema import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from loraplex_server.api.requests.prompts import Prompt
from loraplex_server.api.text.detokenizer import token_offsets
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.wire.messages import TokenLogprobs


class CompletionFormat:
    """Of `/v1/completions`; the answers' text is the tokenizer's."""

    def __init__(self, body: CompletionBody, heading: Heading, tokenizer: Tokenizer) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._token_text = tokenizer.token_text
        # Answers to each prompt; the first of them has its log-probabilities.
        self._num_choices = body.n or 1
        # Alternatives of each entry; None for no entries.
        self._num_logprobs = body.logprobs
        self._usage = None if wants_usage(body) else msgspec.UNSET
        self._scored = bool(body.echo) and body.logprobs is not None
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
        if self._num_logprobs is None:
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
            token_logprobs=[None if entry is None else finite(entry.logprob) for entry in found],
            top_logprobs=[None if entry is None else self._best(entry) for entry in found]
            if self._num_logprobs
            else None,
            text_offset=list(offsets),
        )

    def _best(self, entry: TokenLogprobs) -> dict[str, float]:
        # Of tokens that look alike, the most probable.
        texts = [self._token_text(top.token_id) for top in entry.top]
        pairs = zip(texts, entry.top, strict=True)
        return {text: finite(top.logprob) for text, top in reversed(list(pairs))}
