"""Streams whose clients have stopped reading: found, and ended with an error."""

from __future__ import annotations

import asyncio
from typing import Any

from loraplex_server.core.errors import Reason, ResourceExhaustedError

# Looks within the limit: a stalled call is given up a quarter of it late at most.
_LOOKS = 4


class StallWatch:
    """Writes messages of calls, and gives up the calls whose clients take none for `limit_s`; 0 is never.

    gRPC itself waits for ever: the connection is alive, but nobody reads. The error still goes to the client,
    behind the messages that it has not read yet.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: dict[asyncio.Task[Any], float] = {}
        self._given_up: set[asyncio.Task[Any]] = set()

    async def write(self, task: asyncio.Task[Any], context: Any, message: Any) -> None:
        """Sends one message from `task`, the current one; waits while the client reads slowly.

        Raises:
            ResourceExhaustedError: it does not read.
        """
        self._since_s[task] = asyncio.get_running_loop().time()
        try:
            await context.write(message)
        except asyncio.CancelledError:
            if task not in self._given_up:
                raise
            self._given_up.discard(task)
            task.uncancel()
            raise ResourceExhaustedError(
                f"the stream was not read for {self._limit_s:g} s; read it faster, or ask for less at a time",
                reason=Reason.READER_TOO_SLOW,
            ) from None
        finally:
            del self._since_s[task]

    async def run(self) -> None:
        """Checks the calls, four times in `limit_s`, until it is cancelled."""
        while self._limit_s:
            await asyncio.sleep(self._limit_s / _LOOKS)
            self.look(asyncio.get_running_loop().time())

    def look(self, now_s: float) -> None:
        """Gives up what has been written for too long at `now_s`, by the event loop's clock."""
        for task, since_s in self._since_s.items():
            if now_s - since_s >= self._limit_s and task not in self._given_up:
                self._given_up.add(task)
                task.cancel()
