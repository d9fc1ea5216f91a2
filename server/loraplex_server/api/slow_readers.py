"""A caller that does not read its stream is told so, instead of holding the server's memory for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from loraplex_server.errors import Reason, ResourceExhaustedError

Write = Callable[[Any], Awaitable[None]]


class ReaderWatch:
    """Hands messages on; a with block around it ends where one is not taken for `limit_s` seconds.

    One timer for a whole stream: a message costs two attributes and a look at the clock.

    Args:
        write: returns once the transport has room for the message.
        limit_s: 0 waits for ever.
    """

    def __init__(self, write: Write, limit_s: float) -> None:
        self._write = write
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stalled = False

    def __enter__(self) -> ReaderWatch:
        if self._limit_s:
            self._timer = self._loop.call_later(self._limit_s, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises: ResourceExhaustedError: the reader did not read."""
        if self._timer is not None:
            self._timer.cancel()
        # Whoever else cancelled the task meanwhile is not overruled.
        if self._stalled and self._task is not None and not self._task.uncancel():
            raise ResourceExhaustedError(
                f"nothing of the stream was read for {self._limit_s:g} s",
                resource=("stream", "unread messages"),
                reason=Reason.SLOW_READER,
            ) from error

    async def write(self, message: Any) -> None:
        """Returns once the message is on its way."""
        self._since_s = self._loop.time()
        await self._write(message)
        self._since_s = None

    def _look(self) -> None:
        now_s = self._loop.time()
        since_s = now_s if self._since_s is None else self._since_s
        if now_s - since_s < self._limit_s:
            self._timer = self._loop.call_at(since_s + self._limit_s, self._look)
        elif self._task is not None:
            self._stalled = True
            self._task.cancel()
