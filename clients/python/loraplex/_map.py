"""Many prompts, so many at a time, and their answers in order."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, cast

from loraplex import _convert as convert
from loraplex._convert import Conversation, GenerateOptions, Prompt
from loraplex._types import Generation
from loraplex.errors import InvalidRequestError, LoraplexError
from loraplex.v1 import generation_pb2

MapItem = Prompt | Conversation | tuple[Prompt | Conversation, GenerateOptions]
"""A prompt, or one with options of its own, which go before those that all have."""

MapProgress = Callable[[int, int | None], None]
"""Called with the answers that are finished, and all there are, once that is known."""

AnswerT = TypeVar("AnswerT")

_Request = generation_pb2.GenerateRequest
_Outcome = Generation | LoraplexError

_AHEAD = 2
"""Windows of `concurrency` that are started or finished before the caller takes their answers."""


class PendingAnswer(Protocol):
    """An answer under way, which another thread may cancel."""

    def collect(self) -> Generation: ...

    def close(self) -> None: ...


class MapSource:
    """The requests, each made when it is wanted; what a prompt is lacking counts as its answer.

    Raises:
        InvalidRequestError: an argument is wrong.
    """

    def __init__(
        self,
        prompts: Iterable[MapItem],
        options: GenerateOptions,
        concurrency: int,
        progress: MapProgress | None,
    ) -> None:
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise InvalidRequestError.for_field(
                "prompts", f"must be an iterable of prompts, not {type(prompts).__name__}"
            )
        if concurrency < 1:
            raise InvalidRequestError.for_field("concurrency", f"must be at least 1, not {concurrency}")
        self.concurrency = concurrency
        self.window = _AHEAD * concurrency
        self._items = iter(prompts)
        self._total = len(prompts) if isinstance(prompts, Sized) else None
        self._options = options
        self._progress = progress
        self._told = 0
        self._read = 0

    def next(self) -> _Request | LoraplexError | None:
        """The next request; the error of one that cannot be made; None at the end."""
        try:
            item = next(self._items)
        except StopIteration:
            self._total = self._read
            return None
        self._read += 1
        try:
            return item_request(item, self._options)
        except InvalidRequestError as error:
            return error

    def tell(self, finished: int) -> None:
        """Reports progress, if there is any; called where the answers are taken."""
        if self._progress is not None and finished > self._told:
            self._told = finished
            self._progress(finished, self._total)


def item_request(item: MapItem, options: Mapping[str, Any]) -> _Request:
    """The request for one of many prompts; its own options go before those of all.

    Raises:
        InvalidRequestError: an argument is of the wrong type, or two exclude each other.
    """
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping)):
        return convert.generate_request(cast("Prompt | Conversation", item), **options)
    prompt, own = item
    merged = {**options, **own}
    # They say the same thing in two ways: of all prompts' one, nothing is left.
    for name in ("adapter", "adapters"):
        if name not in own and own.keys() & {"adapter", "adapters"}:
            merged.pop(name, None)
    return convert.generate_request(prompt, **merged)


class GenerationMap(Generic[AnswerT]):
    """The answers of `map`, in the order of their prompts: iterate over it.

    Leaving it early cancels what still runs: by `with`, by `close()`, or by letting go of the last reference.
    """

    def __init__(
        self, source: MapSource, start: Callable[[_Request], PendingAnswer], return_errors: bool
    ) -> None:
        self._source = source
        self._workers = _Workers(start, source.concurrency)
        self._return_errors = return_errors
        self._window: collections.deque[Future[_Outcome]] = collections.deque()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnswerT:
        try:
            while not self._ended and len(self._window) < self._source.window:
                request = self._source.next()
                if request is None:
                    self._ended = True
                else:
                    self._window.append(self._workers.submit(request))
            if not self._window:
                raise StopIteration
            outcome = self._window[0].result()
            self._window.popleft()
            self._source.tell(self._workers.finished)
            if isinstance(outcome, LoraplexError) and not self._return_errors:
                raise outcome
        except BaseException:
            self.close()
            raise
        # With errors raised, it is no error here.
        return cast("AnswerT", outcome)

    def collect(self) -> list[AnswerT]:
        """The answers that are left, as a list."""
        return list(self)

    def close(self) -> None:
        """Cancels what still runs and reads no more prompts. It waits for nothing but the cancellations."""
        self._ended = True
        self._window.clear()
        self._workers.close(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed, and the collector must not wait.
        if (workers := getattr(self, "_workers", None)) is not None:
            workers.close(wait=False)


class _Workers:
    """Threads that wait for answers. They hold on to this, not to the map: that may go while they run."""

    def __init__(self, start: Callable[[_Request], PendingAnswer], number: int) -> None:
        self._start = start
        self._pool = ThreadPoolExecutor(number, thread_name_prefix="loraplex-map")
        self._lock = threading.Lock()
        self._running: set[PendingAnswer] = set()
        self._closed = False
        self.finished = 0

    def submit(self, request: _Request | LoraplexError) -> Future[_Outcome]:
        return self._pool.submit(self._run, request)

    def close(self, *, wait: bool) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        for pending in running:
            pending.close()
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _run(self, request: _Request | LoraplexError) -> _Outcome:
        try:
            return request if isinstance(request, LoraplexError) else self._answer(request)
        except LoraplexError as error:
            return error
        finally:
            with self._lock:
                self.finished += 1

    def _answer(self, request: _Request) -> Generation:
        pending = self._start(request)
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


class AsyncGenerationMap(Generic[AnswerT]):
    """The answers of `map`, in the order of their prompts: iterate over it.

    Leaving it early cancels what still runs: by `async with`, by `close()`, or by letting go of the last
    reference.
    """

    def __init__(
        self, source: MapSource, generate: Callable[[_Request], Awaitable[Generation]], return_errors: bool
    ) -> None:
        self._source = source
        self._generate = generate
        self._return_errors = return_errors
        self._window: collections.deque[asyncio.Task[_Outcome]] = collections.deque()
        self._places = asyncio.Semaphore(source.concurrency)
        self._finished: list[None] = []
        self._ended = False
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnswerT:
        try:
            while not self._ended and len(self._window) < self._source.window:
                request = self._source.next()
                if request is None:
                    self._ended = True
                else:
                    answer = _answer(self._generate, request, self._places, self._finished)
                    self._window.append(asyncio.create_task(answer))
            if not self._window:
                raise StopAsyncIteration
            outcome = await self._window[0]
            self._window.popleft()
            self._source.tell(len(self._finished))
            if isinstance(outcome, LoraplexError) and not self._return_errors:
                raise outcome
        except BaseException:
            await self.close()
            raise
        return cast("AnswerT", outcome)

    async def collect(self) -> list[AnswerT]:
        """The answers that are left, as a list."""
        return [answer async for answer in self]

    async def close(self) -> None:
        """Cancels what still runs and reads no more prompts. It waits for nothing but the cancellations."""
        self._ended = True
        left = list(self._window)
        self._window.clear()
        _cancel(left)
        await asyncio.gather(*left, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The collector may run on another thread, or after the loop; the constructor may have failed.
        if left := list(getattr(self, "_window", ())):
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_cancel, left)


async def _answer(
    generate: Callable[[_Request], Awaitable[Generation]],
    request: _Request | LoraplexError,
    places: asyncio.Semaphore,
    finished: list[None],
) -> _Outcome:
    """What one task of a map does; it does not hold on to the map, which may go while it runs."""
    try:
        if isinstance(request, LoraplexError):
            return request
        async with places:
            return await generate(request)
    except LoraplexError as error:
        return error
    finally:
        finished.append(None)


def _cancel(tasks: Iterable[asyncio.Task[_Outcome]]) -> None:
    for task in tasks:
        task.cancel()
