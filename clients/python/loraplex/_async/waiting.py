"""How coroutines wait: channels of grpc.aio, asyncio's own limits, tasks. `_sync/waiting.py` is its twin."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

import grpc.aio

from loraplex._calls import Call
from loraplex._channel import ChannelSettings
from loraplex._map import MapRequest, Outcome
from loraplex._transport import Stubs, stubs_on
from loraplex._types import Generation
from loraplex.errors import LoraplexError, TimeoutPhase
from loraplex.v1 import generation_pb2

sleep = asyncio.sleep


class Channel:
    """A channel and its stubs, opened with the first call: grpc.aio binds it to the loop that runs then."""

    def __init__(self, settings: ChannelSettings, interceptors: list[Any]) -> None:
        self._settings = settings
        self._interceptors = interceptors
        self._grpc: grpc.aio.Channel | None = None
        self._stubs: Stubs | None = None

    def _opened(self) -> grpc.aio.Channel:
        if self._grpc is None:
            asyncio.get_running_loop()
            settings, interceptors = self._settings, self._interceptors
            self._grpc = (
                grpc.aio.insecure_channel(settings.target, settings.options, interceptors=interceptors)
                if settings.credentials is None
                else grpc.aio.secure_channel(
                    settings.target, settings.credentials, settings.options, interceptors=interceptors
                )
            )
        return self._grpc

    def stub(self, method: str) -> Any:
        """The callable of a method of loraplex.v1, such as `GenerationService/Generate`."""
        if self._stubs is None:
            self._stubs = stubs_on(self._opened())
        return self._stubs.method(method)

    def raw_stub(self, path: str) -> Any:
        """The callable of any unary method, from bytes to bytes."""
        return self._opened().unary_unary(path)

    async def close(self) -> None:
        if self._grpc is not None:
            await self._grpc.close(grace=None)


def start(stub: Any, request: Any, options: dict[str, Any]) -> Any:
    """Sends a unary call, which `result` waits for and its `cancel()` ends."""
    return stub(request, **options)


async def result(started: Any) -> Any:
    return await started


async def next_message(messages: Any, call: Call, phase: TimeoutPhase, seconds: float | None) -> Any:
    """The next message of a stream; None at its end.

    Raises:
        DeadlineExceededError: none came within `seconds`; the stream is cancelled.
    """
    try:
        async with asyncio.timeout(seconds):
            message = await messages.read()
    except TimeoutError:
        messages.cancel()
        raise call.late(phase) from None
    return None if message is grpc.aio.EOF else message


async def outgoing(parts: Iterator[Any]) -> AsyncIterator[Any]:
    """The messages of an upload. Threads make them, since that reads and hashes files."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part


class Finaliser:
    """Runs an action for the garbage collector, which may run on another thread, or after the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def run(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action)


class PendingAnswer(Protocol):
    """An answer under way; the task that collects it may be cancelled."""

    async def collect(self) -> Generation: ...


class Workers:
    """Tasks that wait for answers, `number` at a time; answers are taken in the order of their requests.

    The tasks refer to this object, not to the map that made it: the map may go while they run.
    """

    def __init__(self, begin: Callable[[generation_pb2.GenerateRequest], PendingAnswer], number: int) -> None:
        self._begin = begin
        self._places = asyncio.Semaphore(number)
        self._tasks: collections.deque[asyncio.Task[Outcome]] = collections.deque()
        self._finaliser = Finaliser()
        self.finished = 0

    @property
    def pending(self) -> int:
        """Requests whose answers have not been taken."""
        return len(self._tasks)

    def submit(self, request: MapRequest) -> None:
        self._tasks.append(asyncio.create_task(self._run(request)))

    async def take(self) -> Outcome:
        """Waits for the answer to the oldest request."""
        outcome = await self._tasks[0]
        self._tasks.popleft()
        return outcome

    async def close(self) -> None:
        """Cancels what still runs, and waits until that is done."""
        left = list(self._tasks)
        self._tasks.clear()
        _cancel(left)
        await asyncio.gather(*left, return_exceptions=True)

    def let_go(self) -> None:
        """`close` for the garbage collector: it does not wait."""
        if left := list(self._tasks):
            self._finaliser.run(lambda: _cancel(left))

    async def _run(self, request: MapRequest) -> Outcome:
        try:
            if isinstance(request, LoraplexError):
                return request
            async with self._places:
                return await self._begin(request).collect()
        except LoraplexError as error:
            return error
        finally:
            self.finished += 1


def _cancel(tasks: list[asyncio.Task[Outcome]]) -> None:
    for task in tasks:
        task.cancel()
