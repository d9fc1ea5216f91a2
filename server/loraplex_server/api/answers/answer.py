"""From the engine's token deltas to the pieces of an answer that a client sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec

from loraplex_server.api.requests.prompts import Prompt
from loraplex_server.api.text.detokenizer import Detokenizer, StopMatcher, TokenDecoder
from loraplex_server.core.request import FinishReason
from loraplex_server.wire.messages import Times, TokenDelta, TokenLogprobs


@dataclasses.dataclass(frozen=True)
class Finish:
    """The reason for which an answer ended.

    Attributes:
        stop_match: the stop string that ended it, or "".
        times: the engine's last; as of the first token where a stop string ended the answer.
    """

    reason: FinishReason
    stop_match: str
    times: Times | None


class Piece(msgspec.Struct, frozen=True):
    """Text and tokens that became certain; `logprobs` is empty or has one entry a token.

    Attributes:
        offsets: where there are `logprobs`, for each token the characters of the answer before its text.
        prompt_logprobs: those of the prompt's tokens that became known.
        prompt: on the first piece, where it is to be echoed; no part of `text` or `token_ids`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish | None
    offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: Prompt | None = None

    @property
    def empty(self) -> bool:
        return not (self.text or self.token_ids or self.prompt_logprobs) and self.finish is None


@dataclasses.dataclass(frozen=True)
class End:
    """The end of an answer, with its counts and times.

    Attributes:
        first_token_s, total_s: seconds since the arrival.
    """

    finish: Finish
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float


class Answer:
    """The answer to one request as it grows. `include_stop` makes the stop string part of it.

    A token belongs to the answer when its text begins before the stop string does: one that is partly
    in it is returned and counted whole, one that lies within it or after it is neither. So while text
    is held back because a stop string may begin there, the tokens of that text are held back with it.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        prompt_token_ids: Sequence[int],
        stops: Sequence[str],
        *,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(decoder, prompt_token_ids)
        self._matcher = StopMatcher(stops)
        self._may_stop = bool(stops)
        self._include_stop = include_stop
        # Tokens not yet given out, each with the number of characters before its text.
        self._pending: list[tuple[int, int, TokenLogprobs | None]] = []
        self._characters = 0
        self._released = 0
        self._times: Times | None = None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.num_tokens = 0

    def push(self, delta: TokenDelta) -> Piece:
        """Takes new tokens in. After a piece with `finish` nothing more may be pushed."""
        if not self._may_stop and not delta.logprobs:
            return self._plain(delta)
        text = ""
        self._times = delta.times or self._times
        self._prompt_logprobs = delta.prompt_logprobs
        last = len(delta.token_ids) - 1
        for index, token_id in enumerate(delta.token_ids):
            logprobs = delta.logprobs[index] if delta.logprobs else None
            self._pending.append((self._characters, token_id, logprobs))
            if not (delta.stop_token and index == last):
                text += self._match(self._detokenizer.push(token_id))
            if self._matcher.match is not None:
                return self._stopped(text)
        if delta.finish is None:
            return self._piece(text, None)
        text += self._match(self._detokenizer.flush())
        if self._matcher.match is not None:
            return self._stopped(text)
        text += self._matcher.flush()
        return self._piece(text, Finish(delta.finish, "", delta.times))

    def _plain(self, delta: TokenDelta) -> Piece:
        """The short way, for answers in which nothing depends on which token brought which text."""
        token_ids = delta.token_ids
        text = self._detokenizer.extend(token_ids[:-1] if delta.stop_token else token_ids)
        finish = None
        if delta.finish is not None:
            text += self._detokenizer.flush()
            finish = Finish(delta.finish, "", delta.times)
        self._characters += len(text)
        self.num_tokens += len(token_ids)
        return Piece(text, token_ids, (), finish, prompt_logprobs=delta.prompt_logprobs)

    def _match(self, text: str) -> str:
        self._characters += len(text)
        certain = self._matcher.push(text)
        self._released += len(certain)
        return certain

    def _stopped(self, text: str) -> Piece:
        match = self._matcher.match or ""
        end = self._released
        if self._include_stop:
            text, end = text + match, end + len(match)
        self._pending = [token for token in self._pending if token[0] < end]
        return self._piece(text, Finish(FinishReason.STOP, match, self._times))

    def _piece(self, text: str, finish: Finish | None) -> Piece:
        ready = self._pending
        self._pending = []
        if self._may_stop and finish is None:
            self._pending = [token for token in ready if token[0] >= self._released]
            ready = ready[: len(ready) - len(self._pending)]
        self.num_tokens += len(ready)
        return Piece(
            text=text,
            token_ids=tuple(token_id for _, token_id, _ in ready),
            logprobs=tuple(logprobs for _, _, logprobs in ready if logprobs is not None),
            finish=finish,
            offsets=tuple(offset for offset, _, _ in ready),
            prompt_logprobs=self._prompt_logprobs,
        )
