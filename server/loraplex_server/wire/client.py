"""The API's end of the connection to an engine: requests, commands and watches."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, cast

import msgspec

from loraplex_server.core.adapter_status import AdapterChanges
from loraplex_server.core.errors import InternalError, Reason, ServerError, UnavailableError, from_info
from loraplex_server.core.request import Request
from loraplex_server.core.tokenizer_source import TokenizerSource
from loraplex_server.wire.commands import AnswerT, AnyCommand, Call, Command, Reply
from loraplex_server.wire.deltas import DeltaQueue
from loraplex_server.wire.frames import FrameBuffer, decode_from_engine, encode
from loraplex_server.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    EngineInfo,
    Failed,
    FromEngine,
    Hello,
    Shutdown,
    Submit,
    ToEngine,
    TokenDelta,
    TokenizersChanged,
    Tokens,
    UnwatchAdapters,
    WatchAdapters,
    Welcome,
)
from loraplex_server.wire.stats import Stats
from loraplex_server.wire.watcher import AdapterWatcher

_READ_BYTES = 1 << 18


class EngineClient:
    """One connection to an engine. Call its methods only in the event loop that called `connect`.

    Each request has a queue for its deltas, so a slow reader does not delay other requests.

    Attributes:
        info: the model and the limits of the engine.
        tokenizers: the present tokenizers of adapters that bring one, by adapter name.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
        tokenizers: Mapping[str, TokenizerSource],
        note: Callable[[Command[Any]], None] | None,
        *,
        max_joined: int,
        max_unread: int,
    ) -> None:
        self.info = info
        self.tokenizers = dict(tokenizers)
        self._max_joined = max_joined
        self._max_unread = max_unread
        self._note = note
        self._reader = reader
        self._writer = writer
        self._streams: dict[str, DeltaQueue] = {}
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._call_ids = itertools.count(1)
        self._watchers: set[AdapterWatcher] = set()
        self._stats_listeners: list[Callable[[Stats], None]] = []
        self._lost: ServerError | None = None
        self._closing = False
        self._closed = asyncio.Event()
        self._task = asyncio.create_task(self._receive(), name="engine-client")

    @classmethod
    async def connect(
        cls,
        socket_path: str,
        token: str,
        note: Callable[[Command[Any]], None] | None = None,
        *,
        max_joined: int = 256,
        max_unread: int = 4096,
    ) -> EngineClient:
        """Connects to the engine listening at `socket_path`.

        Args:
            token: the secret that proves to the engine that this client may connect.
            note: called with each command that succeeds.
            max_joined: most tokens that `stream` joins in one delta for a slow reader.
            max_unread: a request ends with an error if more tokens than this wait for its reader.

        Raises:
            UnavailableError: no engine listens there, or it has another protocol version.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(socket_path)
            writer.write(encode(Hello(PROTOCOL_VERSION, uuid.uuid4().hex, token)))
            await writer.drain()
            message = await _read(reader)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise UnavailableError(f"the engine cannot be reached: {error}") from error
        if not isinstance(message, Welcome) or message.version != PROTOCOL_VERSION:
            raise UnavailableError("the engine has another protocol version; run the same release of both")
        return cls(
            reader,
            writer,
            message.info,
            message.tokenizers,
            note,
            max_joined=max_joined,
            max_unread=max_unread,
        )

    @property
    def alive(self) -> bool:
        """True until the connection is lost or closed."""
        return self._lost is None and not self._closing

    async def wait_closed(self) -> None:
        """Waits until the connection is lost or closed."""
        await self._closed.wait()

    def on_stats(self, listener: Callable[[Stats], None]) -> None:
        """Calls `listener` with every `Stats` message from now on."""
        self._stats_listeners.append(listener)

    async def stream(self, request: Request) -> AsyncGenerator[TokenDelta]:
        """Runs a request and yields its deltas; the last one has `finish`.

        Leaving the iteration early (close, cancellation, an exception) cancels the request: the engine frees
        everything that it holds within a step.

        Raises:
            InternalError: another live request has this id.
            ServerError: the engine's error, as its original class.
        """
        if request.request_id in self._streams:
            raise InternalError(f"request id {request.request_id!r} is in use")
        queue = DeltaQueue(self._max_joined, self._max_unread)
        self._streams[request.request_id] = queue
        finished = False
        try:
            self._send(Submit(request))
            while not finished:
                delta = await queue.take()
                finished = delta.finish is not None
                yield delta
        except ServerError:
            finished = True
            raise
        finally:
            del self._streams[request.request_id]
            if not finished and self.alive:
                self._send(Cancel(request.request_id))

    async def command(self, command: Command[AnswerT]) -> AnswerT:
        """Has the engine carry out a command, and returns its answer.

        Raises:
            ServerError: the engine's error, as its original class.
        """
        call_id = next(self._call_ids)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            # Every Command is in AnyCommand, a union that the decoder needs.
            self._send(Call(call_id, cast("AnyCommand", command)))
            reply = await future
        finally:
            self._calls.pop(call_id, None)
        if reply.error is not None:
            raise from_info(reply.error)
        if self._note is not None:
            self._note(command)
        # Both ends have the same protocol version, so the answer is of the command's type.
        return cast("AnswerT", reply.answer)

    async def watch_adapters(self) -> AsyncGenerator[AdapterChanges]:
        """Yields all adapters, then their changes, for as long as the caller iterates.

        Changes that the caller has not taken yet are joined, so each one shows the present state.

        Raises:
            ServerError: the connection is lost or closed.
        """
        watcher = AdapterWatcher()
        self._watchers.add(watcher)
        try:
            self._send(WatchAdapters())
            while True:
                yield await watcher.next()
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self.alive:
                self._send(UnwatchAdapters())

    async def shutdown(self) -> None:
        """Tells the engine to exit, and closes the connection."""
        if self.alive:
            self._send(Shutdown())
        await self.close()

    async def close(self) -> None:
        """Closes the connection; the engine cancels this client's running requests."""
        self._closing = True
        self._writer.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._lose(UnavailableError("the server is shutting down", reason=Reason.SERVER_DRAINING))

    def _send(self, message: ToEngine) -> None:
        if self._lost is not None:
            raise self._lost
        self._writer.write(encode(message))

    async def _receive(self) -> None:
        frames = FrameBuffer()
        try:
            while data := await self._reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    self._dispatch(decode_from_engine(body))
            raise EOFError
        except (OSError, EOFError):
            self._lose(
                UnavailableError(
                    "the engine has stopped; try again when it is running again",
                    retry_after_s=2.0,
                    reason=Reason.ENGINE_LOST,
                )
            )
        except msgspec.DecodeError as error:
            self._lose(InternalError(f"the engine sent an invalid message: {error}"))

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Tokens():
                for delta in message.deltas:
                    # A delta may arrive after our Cancel: the two cross on the way.
                    stream = self._streams.get(delta.request_id)
                    if stream is not None and not stream.put(delta):
                        self._send(Cancel(delta.request_id))
            case Failed():
                if (stream := self._streams.get(message.request_id)) is not None:
                    stream.fail(from_info(message.error))
            case Reply():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case AdapterChanges():
                for watcher in self._watchers:
                    watcher.put(message)
            case TokenizersChanged():
                for name, source in message.changed.items():
                    if source is None:
                        self.tokenizers.pop(name, None)
                    else:
                        self.tokenizers[name] = source
            case Stats():
                for listener in self._stats_listeners:
                    listener(message)
            case Welcome():
                pass

    def _lose(self, error: ServerError) -> None:
        self._lost = self._lost or error
        for stream in self._streams.values():
            stream.fail(self._lost)
        for watcher in self._watchers:
            watcher.fail(self._lost)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._lost)
        self._closed.set()


async def _read(reader: asyncio.StreamReader) -> FromEngine:
    length = int.from_bytes(await reader.readexactly(4), "big")
    return decode_from_engine(await reader.readexactly(length))
