"""One request's deltas on their way to a caller who may be slower than the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import chain

from loraplex_server.engine.messages import TokenDelta
from loraplex_server.errors import ResourceExhaustedError, ServerError


class DeltaQueue:
    """Deltas in the order they came. Belongs to one event loop, and to one taker.

    A taker who is up to date gets every delta by itself. For one who is behind, what waits is joined: up to
    `max_joined` tokens at once. Where more than `max_unread` tokens wait, they are dropped for an error.
    """

    def __init__(self, max_joined: int, max_unread: int) -> None:
        self._max_joined = max_joined
        self._max_unread = max_unread
        self._deltas: deque[TokenDelta] = deque()
        self._unread = 0
        self._error: ServerError | None = None
        self._taker: asyncio.Future[None] | None = None

    def put(self, delta: TokenDelta) -> bool:
        """Adds a delta; False if that was one too many: the taker will get an error, and the request should
        end."""
        if self._error is not None:
            return True
        self._unread += len(delta.token_ids)
        # The end of an answer costs the engine nothing more, however late it is read.
        if self._unread > self._max_unread and delta.finish is None:
            self._deltas.clear()
            self.fail(
                ResourceExhaustedError(
                    f"{self._unread} tokens wait to be read; read the stream faster, or ask for fewer tokens"
                )
            )
            return False
        self._deltas.append(delta)
        self._wake()
        return True

    def fail(self, error: ServerError) -> None:
        """Ends the queue: after what waits comes `error`."""
        self._error = self._error or error
        self._wake()

    async def take(self) -> TokenDelta:
        """What waits, as one delta; waits for it.

        Raises:
            ServerError: that of `fail`, once there is nothing before it.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._taker = asyncio.get_running_loop().create_future()
            try:
                await self._taker
            finally:
                self._taker = None
        deltas = self._deltas
        first = deltas.popleft()
        count = len(first.token_ids)
        if deltas and count + len(deltas[0].token_ids) <= self._max_joined:
            joined = [first]
            while deltas and count + len(deltas[0].token_ids) <= self._max_joined:
                joined.append(deltas.popleft())
                count += len(joined[-1].token_ids)
            first = _join(joined)
        self._unread -= count
        return first

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)


def _join(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """One delta for several of a request, the last of which may be its end."""
    last = deltas[-1]
    return TokenDelta(
        request_id=last.request_id,
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        finish=last.finish,
        stop_token=last.stop_token,
        times=last.times or deltas[0].times,
    )
