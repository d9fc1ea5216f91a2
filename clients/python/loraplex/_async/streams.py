"""Streams of one call: answers, batches, adapter changes. Leaving one early cancels its call."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from loraplex._async.transport import AsyncTransport
from loraplex._async.waiting import Finaliser, next_message
from loraplex._batch import BatchResult, in_order
from loraplex._calls import Call, Reader
from loraplex._readers import joined
from loraplex._types import AdapterChanges, Generation, GenerationChunk
from loraplex.errors import LoraplexError

ItemT = TypeVar("ItemT")


class AsyncMessages:
    """The messages of one stream, each waited for as long as the call's limits allow.

    The call is made at once, or, where it may have to wait for a connection, with the first read.
    """

    def __init__(self, transport: AsyncTransport, call: Call, request: Any) -> None:
        self.call = call
        self._transport = transport
        self._request = request
        self._grpc: Any = None
        self._closed = False
        self._first = True
        self._finaliser = Finaliser()
        if not call.must_connect:
            with call:
                self._open()

    def _open(self) -> None:
        stub = self._transport.stub(self.call.method)
        self._grpc = stub(self._request, **self.call.options())
        if self._closed:
            self._grpc.cancel()

    async def read(self) -> Any:
        """The next message; None at the end."""
        with self.call:
            if self._grpc is None:
                await self._transport.connect(self.call)
                self._open()
            phase, seconds = self.call.wait_phase(self._first)
            self._first = False
            return await next_message(self._grpc, self.call, phase, seconds)

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._closed = True
        if self._grpc is not None:
            self._grpc.cancel()
        self.call.leave()

    def let_go(self) -> None:
        """`close` for the garbage collector."""
        self._finaliser.run(self.close)


class AsyncStream(Generic[ItemT]):
    """The items that arrive during one call.

    Leaving it early cancels the call: by `async with`, by `close()`, or by letting go of the last reference.
    """

    def __init__(self, messages: AsyncMessages, reader: Reader[ItemT]) -> None:
        self._messages = messages
        self._reader = reader

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ItemT:
        message = await self._messages.read()
        with self._messages.call:
            if message is not None:
                item = self._reader.read(message)
                self._messages.call.info.request_id = self._reader.request_id
                return item
            self._reader.check_complete()
        self._messages.call.finish()
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancels what has not finished."""
        self._messages.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (messages := getattr(self, "_messages", None)) is not None:
            messages.let_go()


class AsyncGenerationStream(AsyncStream[GenerationChunk]):
    """An answer as it is generated: iterate over it for chunks.

    Leaving it early cancels the generation on the server: by `async with`, by `close()`, or by
    letting go of the last reference.
    """

    @property
    def request_id(self) -> str:
        """As the server's logs name it; empty before the first chunk, unless the caller chose it."""
        return self._messages.call.info.request_id

    async def collect(self) -> Generation:
        """Reads what is left of the answer and returns that as one Generation."""
        return joined([chunk async for chunk in self])


class AsyncGenerationBatch(AsyncStream[BatchResult]):
    """The results of a batch, each as it finishes: iterate over it.

    Leaving it early cancels those that are not finished: by `async with`, by `close()`, or by letting go
    of the last reference.
    """

    async def collect(self) -> list[Generation | LoraplexError]:
        """Reads what is left, and returns that in the order of the prompts."""
        return in_order([result async for result in self])


class AsyncAdapterWatch(AsyncStream[AdapterChanges]):
    """Changes of the adapters: iterate over it. It ends by `async with`, or by `close()`."""
