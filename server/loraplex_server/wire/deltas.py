"""One request's deltas, on their way to a reader who may be slower than the engine."""

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
"""Least time between two messages of a stream that is behind. A message costs as much as ten tokens in it, so
that fewer and longer messages let a busy process catch up."""

SPACED_S = 0.5
"""Time for which a stream counts as behind, from the last time that it was."""


class Spacing:
    """Keeps the messages of one stream apart while it is behind. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._until_s = -math.inf
        self._last_s = -math.inf

    def behind(self, now_s: float) -> None:
        """The stream is behind at `now_s`."""
        self._until_s = now_s + SPACED_S

    def pause_s(self, now_s: float) -> float:
        """Seconds to wait before the next message; 0 if the stream is not behind."""
        return max(0.0, self._last_s + SPACING_S - now_s) if now_s < self._until_s else 0.0

    def sent(self, now_s: float) -> None:
        """A message is sent at `now_s`."""
        self._last_s = now_s


class DeltaQueue:
    """Deltas in the order they came. Belongs to one event loop, and has one reader.

    A reader that keeps up gets every delta by itself, at once. For one that is behind, the deltas that wait
    are joined, up to `max_joined` tokens at a time. If more than `max_unread` tokens wait, they are dropped
    and the reader gets an error.
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
        """Adds a delta. False if too many tokens wait: the reader gets an error; the request should end."""
        if self._error is not None:
            return True
        self._unread += len(delta.token_ids)
        # The end of an answer costs the engine nothing more, however late it is read.
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
        """Ends the queue with `error`, which is raised after the deltas that wait."""
        self._error = self._error or error
        _end(self._taker)
        _end(self._nap)

    async def take(self) -> TokenDelta:
        """Waits for a delta; gives those that wait, joined to one.

        Raises:
            ServerError: that of `fail`, after all deltas before it.
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
        # No pause if more waits than can be joined, nor before the end of the answer.
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
        """Waits for `seconds`, or until the last delta is there."""
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
    """Tokens that a delta says something of: generated ones, and scored ones of the prompt."""
    return len(delta.token_ids) + len(delta.prompt_logprobs)


def _join(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """One delta for several consecutive ones of a request; the last may end it."""
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
