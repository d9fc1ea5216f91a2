"""Server-sent events, and clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

DONE = b"data: [DONE]\n\n"

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # A proxy that buffers responses would hold the events back.
    (b"x-accel-buffering", b"no"),
)

ResultT = TypeVar("ResultT")


class ClientGoneError(Exception):
    """The client has hung up, or reads no more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Runs `work` and returns its result. When the client hangs up, `work` is cancelled at once.

    Raises:
        ClientGoneError: the client hung up.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events on one response. The headers go out with the first event, so that whatever goes
    wrong before it can still be told by a status.

    While a client reads slowly, its events wait; one that reads nothing for `stall_s` is given up, unless
    that is 0.
    """

    def __init__(self, send: Send, stall_s: float) -> None:
        self._send = send
        self._stall_s = stall_s or None
        self.started = False

    async def event(self, data: bytes) -> None:
        """Sends one event; waits while the client reads slowly.

        Raises:
            ClientGoneError: it does not read any more.
        """
        await self._write(b"data: " + data + b"\n\n", more=True)

    async def end(self, last: bytes = DONE) -> None:
        """Sends `last` and ends the response."""
        await self._write(last, more=False)

    async def _write(self, body: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                if not self.started:
                    self.started = True
                    await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise ClientGoneError from error
