"""How threads wait: channels of grpc, a watchdog for limits, a pool. `_async/waiting.py` is its twin."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import grpc

from loraplex._calls import Call
from loraplex._channel import ChannelSettings
from loraplex._map import MapRequest, Outcome
from loraplex._sync.watchdog import WATCHDOG
from loraplex._transport import stubs_on
from loraplex._types import Generation
from loraplex.errors import LoraplexError, TimeoutPhase
from loraplex.v1 import generation_pb2

sleep = time.sleep


class Channel:
    """A channel and its stubs. Nothing is sent before the first call."""

    def __init__(self, settings: ChannelSettings, interceptors: list[Any]) -> None:
        channel: grpc.Channel = (
            grpc.insecure_channel(settings.target, settings.options)
            if settings.credentials is None
            else grpc.secure_channel(settings.target, settings.credentials, settings.options)
        )
        self._grpc = grpc.intercept_channel(channel, *interceptors) if interceptors else channel
        self._stubs = stubs_on(self._grpc)

    def stub(self, method: str) -> Any:
        """The callable of a method of loraplex.v1, such as `GenerationService/Generate`."""
        return self._stubs.method(method)

    def raw_stub(self, path: str) -> Any:
        """The callable of any unary method, from bytes to bytes."""
        return self._grpc.unary_unary(path)

    def close(self) -> None:
        self._grpc.close()


def start(stub: Any, request: Any, options: dict[str, Any]) -> Any:
    """Sends a unary call, which `result` waits for and its `cancel()` ends, on any thread."""
    return stub.future(request, **options)


def result(started: Any) -> Any:
    return started.result()


def next_message(messages: Any, call: Call, phase: TimeoutPhase, seconds: float | None) -> Any:
    """The next message of a stream; None at its end.

    After `seconds` the watchdog cancels the stream; `call` makes that cancellation a DeadlineExceededError.
    """
    if seconds is None:
        return next(messages, None)

    def late() -> None:
        call.expire(phase)
        messages.cancel()

    wait = WATCHDOG.watch(seconds, late)
    try:
        return next(messages, None)
    finally:
        WATCHDOG.forget(wait)


def outgoing(parts: Iterator[Any]) -> Iterator[Any]:
    """The messages of an upload. gRPC's own thread makes them."""
    return parts


class Finaliser:
    """Runs an action for the garbage collector."""

    def run(self, action: Callable[[], None]) -> None:
        action()


class PendingAnswer(Protocol):
    """An answer under way, which another thread may cancel."""

    def collect(self) -> Generation: ...

    def close(self) -> None: ...


class Workers:
    """Threads that wait for answers, `number` at a time; answers are taken in the order of their requests.

    The threads refer to this object, not to the map that made it: the map may go while they run.
    """

    def __init__(self, begin: Callable[[generation_pb2.GenerateRequest], PendingAnswer], number: int) -> None:
        self._begin = begin
        self._pool = ThreadPoolExecutor(number, thread_name_prefix="loraplex-map")
        self._futures: collections.deque[Future[Outcome]] = collections.deque()
        self._lock = threading.Lock()
        self._running: set[PendingAnswer] = set()
        self._closed = False
        self.finished = 0

    @property
    def pending(self) -> int:
        """Requests whose answers have not been taken."""
        return len(self._futures)

    def submit(self, request: MapRequest) -> None:
        self._futures.append(self._pool.submit(self._run, request))

    def take(self) -> Outcome:
        """Waits for the answer to the oldest request."""
        outcome = self._futures[0].result()
        self._futures.popleft()
        return outcome

    def close(self) -> None:
        """Cancels what still runs, and waits until that is done."""
        self._futures.clear()
        self._cancel(wait=True)

    def let_go(self) -> None:
        """`close` for the garbage collector: it does not wait."""
        self._cancel(wait=False)

    def _cancel(self, *, wait: bool) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for pending in running:
            pending.close()
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _run(self, request: MapRequest) -> Outcome:
        try:
            return request if isinstance(request, LoraplexError) else self._answer(request)
        except LoraplexError as error:
            return error
        finally:
            with self._lock:
                self.finished += 1

    def _answer(self, request: generation_pb2.GenerateRequest) -> Generation:
        pending = self._begin(request)
        with self._lock:
            self._running.add(pending)
            closed = self._closed
        try:
            if closed:
                pending.close()
            return pending.collect()
        finally:
            with self._lock:
                self._running.discard(pending)
