"""Answers, batches and changes as they come in: what a blocking client reads, and what leaving early does."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from loraplex import _convert as convert
from loraplex._batch import BatchResult, in_order
from loraplex._calls import Call, Reader
from loraplex._types import AdapterChanges, Generation, GenerationChunk
from loraplex._watchdog import WATCHDOG
from loraplex.errors import LoraplexError

if TYPE_CHECKING:
    from loraplex._sync import Client

ItemT = TypeVar("ItemT")


class Parts:
    """The messages of one streamed answer, each waited for as long as the call's limits allow.

    The call is made at once, or, where it may have to wait for a connection, with the first read.
    """

    def __init__(self, client: Client, call: Call, request: Any) -> None:
        self.call = call
        self._client = client
        self._request = request
        self._grpc: Any = None
        self._closed = False
        self._first = True
        if not call.must_connect:
            with call:
                self._open()

    def _open(self) -> None:
        method = self._client._stubs.method(self.call.method)
        self._grpc = method(self._request, **self.call.options())
        if self._closed:
            self._grpc.cancel()

    def read(self) -> Any:
        """The next message; None at the end."""
        with self.call:
            if self._grpc is None:
                self._client._connect(self.call)
                self._open()
            phase, seconds = self.call.wait_phase(self._first)
            self._first = False
            if seconds is None:
                return next(self._grpc, None)

            def late() -> None:
                self.call.expire(phase)
                self._grpc.cancel()

            wait = WATCHDOG.watch(seconds, late)
            try:
                return next(self._grpc, None)
            finally:
                WATCHDOG.forget(wait)

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._closed = True
        if self._grpc is not None:
            self._grpc.cancel()
        self.call.leave()


class Stream(Generic[ItemT]):
    """What comes in during one call, item by item.

    Leaving it early cancels the call: by `with`, by `close()`, or by letting go of the last reference.
    """

    def __init__(self, parts: Parts, reader: Reader[ItemT]) -> None:
        self._parts = parts
        self._reader = reader

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ItemT:
        message = self._parts.read()
        with self._parts.call:
            if message is not None:
                item = self._reader.read(message)
                self._parts.call.info.request_id = self._reader.request_id
                return item
            self._reader.check_complete()
        self._parts.call.finish()
        raise StopIteration

    def close(self) -> None:
        """Cancels what has not finished."""
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (parts := getattr(self, "_parts", None)) is not None:
            parts.close()


class GenerationStream(Stream[GenerationChunk]):
    """An answer as it is generated: iterate over it for chunks.

    Leaving it early cancels the generation on the server: by `with`, by `close()`, or by letting go
    of the last reference.
    """

    @property
    def request_id(self) -> str:
        """As the server's logs name it; empty before the first chunk, unless the caller chose it."""
        return self._parts.call.info.request_id

    def collect(self) -> Generation:
        """Reads what is left of the answer and returns that as one Generation."""
        return convert.joined(self)


class GenerationBatch(Stream[BatchResult]):
    """What the prompts of a batch come to, each as it finishes: iterate over it.

    Leaving it early cancels those that are not finished: by `with`, by `close()`, or by letting go
    of the last reference.
    """

    def collect(self) -> list[Generation | LoraplexError]:
        """Reads what is left, and returns that in the order of the prompts."""
        return in_order(self)


class AdapterWatch(Stream[AdapterChanges]):
    """What changes with the adapters: iterate over it. It ends by `with`, or by `close()`."""
