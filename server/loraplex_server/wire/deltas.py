"""A queue for the deltas of one request, whose reader may be slower than the engine."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

from loraplex_server.core.errors import Reason, ResourceExhaustedError, ServerError
from loraplex_server.wire.messages import TokenDelta

BEHIND_S = 0.005
"""A reader is behind if the delta it takes has waited longer than this."""

SPACING_S = 0.020
"""Least time between two messages of a stream that is behind. Sending a message costs as much as ten of its
tokens, so fewer and longer messages let a busy process catch up."""

SPACED_S = 0.5
"""A stream counts as behind for this long after each time that it is behind."""


class Spacing:
    """Keeps a minimum time between the messages of a stream that is behind.

    Times are in seconds of one clock of the caller's choice.
    """

    def __init__(self) -> None:
        self._until_s = -math.inf
        self._last_s = -math.inf

    def behind(self, now_s: float) -> None:
        """Notes that the stream is behind at `now_s`."""
        self._until_s = now_s + SPACED_S

    def pause_s(self, now_s: float) -> float:
        """Seconds to wait before the next message; 0 if the stream is not behind."""
        return max(0.0, self._last_s + SPACING_S - now_s) if now_s < self._until_s else 0.0

    def sent(self, now_s: float) -> None:
        """Notes that a message is sent at `now_s`."""
        self._last_s = now_s


class DeltaQueue:
    """Deltas in order of arrival, for one reader in one event loop.

    A reader that keeps up gets each delta at once. A reader that is behind gets its waiting deltas joined, up
    to `max_joined` tokens at a time. If more than `max_unread` tokens wait, the queue drops them and the
    reader gets an error.
    """

    def __init__(self, max_joined: int, max_unread: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_joined = max_joined
        self._max_unread = max_unread
        self._clock = clock
        self._spacing = Spacing()
        self._deltas: deque[TokenDelta] = deque()
        self._oldest_s = 0.0
        self._unread = 0
        self._error: ServerError | None = None
        self._taker: asyncio.Future[None] | None = None
        self._nap: asyncio.Future[None] | None = None

    def put(self, delta: TokenDelta) -> bool:
        """Adds a delta.

        Returns False if too many tokens wait. The reader then gets an error, and the caller should cancel the
        request.
        """
        if self._error is not None:
            return True
        self._unread += len(delta.token_ids)
        # After the last delta the engine has no more work, so a late reader does no harm.
        if self._unread > self._max_unread and delta.finish is None:
            self._deltas.clear()
            self.fail(
                ResourceExhaustedError(
                    f"{self._unread} tokens wait to be read; read the stream faster, or ask for fewer tokens",
                    reason=Reason.READER_TOO_SLOW,
                )
            )
            return False
        if not self._deltas:
            self._oldest_s = self._clock()
        self._deltas.append(delta)
        _end(self._taker)
        if delta.finish is not None:
            _end(self._nap)
        return True

    def fail(self, error: ServerError) -> None:
        """Ends the queue with `error`, which `take` raises after the waiting deltas."""
        self._error = self._error or error
        _end(self._taker)
        _end(self._nap)

    async def take(self) -> TokenDelta:
        """Waits for a delta; returns all waiting ones joined into one, up to `max_joined` tokens.

        Raises:
            ServerError: the error of `fail`, after all deltas before it.
        """
        deltas = self._deltas
        now_s = self._clock()
        if deltas and now_s - self._oldest_s > BEHIND_S:
            self._spacing.behind(now_s)
        while not deltas:
            if self._error is not None:
                raise self._error
            self._taker = asyncio.get_running_loop().create_future()
            try:
                await self._taker
            finally:
                self._taker = None
            now_s = self._clock()
        # No pause if more tokens wait than can be joined, nor if the last delta is there.
        if self._unread < self._max_joined and deltas[-1].finish is None:
            pause_s = self._spacing.pause_s(now_s)
            if pause_s > 0:
                await self._pause(pause_s)
                now_s = self._clock()
                if not deltas:
                    return await self.take()
        self._spacing.sent(now_s)
        taken = [deltas.popleft()]
        room = self._max_joined - _size(taken[0])
        while deltas and (room := room - _size(deltas[0])) >= 0:
            taken.append(deltas.popleft())
        delta = taken[0] if len(taken) == 1 else _join(taken)
        self._unread -= len(delta.token_ids)
        self._oldest_s = now_s
        return delta

    async def _pause(self, seconds: float) -> None:
        """Waits for `seconds`, or until the last delta arrives."""
        loop = asyncio.get_running_loop()
        self._nap = loop.create_future()
        timer = loop.call_later(seconds, _end, self._nap)
        try:
            await self._nap
        finally:
            timer.cancel()
            self._nap = None


def _end(wait: asyncio.Future[None] | None) -> None:
    if wait is not None and not wait.done():
        wait.set_result(None)


def _size(delta: TokenDelta) -> int:
    """Number of tokens in a delta: generated tokens, and scored tokens of the prompt."""
    return len(delta.token_ids) + len(delta.prompt_logprobs)


def _join(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Joins consecutive deltas of one request; the last one may end the request."""
    last = deltas[-1]
    return TokenDelta(
        request_id=last.request_id,
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        finish=last.finish,
        stop_token=last.stop_token,
        times=last.times or deltas[0].times,
        prompt_logprobs=tuple(chain.from_iterable(delta.prompt_logprobs for delta in deltas)),
    )
