"""The engine as a server on a unix socket: one loop that steps, one thread a connection that reads, and
one that writes.

The loop owns the engine; the other threads touch only queues. It runs in a process of its own
(`engine/process.py`), or in a thread for unit tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import InternalError, ServerError
from loraplex_server.engine.engine import Engine
from loraplex_server.wire.frames import decode_to_engine, encode
from loraplex_server.wire.messages import (
    PROTOCOL_VERSION,
    AdapterChanges,
    AdapterCommand,
    AdapterReply,
    Cancel,
    CheckIntegrity,
    Failed,
    FromEngine,
    Hello,
    Shutdown,
    Submit,
    ToEngine,
    TokenizersChanged,
    Welcome,
)

_log = logging.getLogger(__name__)

_STATS_EVERY_S = 0.1
# Longest sleep of an idle loop; whatever there is to do wakes it before.
_IDLE_S = 0.5
_MAX_FRAME = 64 << 20
# A client that reads nothing this long while its messages pile up is dropped.
_MAX_BACKLOG = 100_000


@dataclasses.dataclass(frozen=True)
class _Connected:
    client: _Client


@dataclasses.dataclass(frozen=True)
class _Gone:
    client: str


_Event = tuple[str, ToEngine] | _Connected | _Gone | None


class _Client:
    """One connection. `send` only queues; a thread of its own writes."""

    def __init__(self, client_id: str, connection: socket.socket) -> None:
        self.id = client_id
        self._connection = connection
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._thread.start()

    def send(self, message: FromEngine) -> None:
        if self._outbox.qsize() > _MAX_BACKLOG:
            self.close()
        else:
            self._outbox.put(encode(message))

    def close(self) -> None:
        """Ends the connection once what is queued has been written, or could not be."""
        self._outbox.put(None)

    def join(self) -> None:
        self._thread.join(timeout=5)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := self._outbox.get()) is not None:
                frames = [frame]
                # What piled up while the last write ran goes out in one.
                while not self._outbox.empty() and (frame := self._outbox.get()) is not None:
                    frames.append(frame)
                self._connection.sendall(b"".join(frames))
                if frame is None:
                    break
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class EngineHost:
    """Serves one engine. `attach` it, then `run` until a client says `Shutdown` or `stop` is called."""

    def __init__(self, socket_path: str, token: str) -> None:
        self._token = token
        self._path = socket_path
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._clients: dict[str, _Client] = {}
        # Clients that want to know what changes with the adapters.
        self._watchers: set[str] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(socket_path)
        os.chmod(socket_path, 0o600)
        # From here on clients may connect; they are answered once `run` is called.
        self._listener.listen()
        self._stopping = False
        self._last_stats_s = 0.0

    def emit(self, client: str, message: FromEngine) -> None:
        """Sends a message to a client; one that is gone gets nothing."""
        if (found := self._clients.get(client)) is not None:
            found.send(message)

    def wake(self) -> None:
        """Makes an idle loop look again; may be called from any thread."""
        self._events.put(None)

    def stop(self) -> None:
        """Ends `run` after the step at hand; may be called from any thread."""
        self._stopping = True
        self.wake()

    def run(self, engine: Engine) -> None:
        """Accepts clients and steps the engine until told to stop. The caller's thread owns the engine."""
        threading.Thread(target=self._accept, name="engine-accept", daemon=True).start()
        try:
            busy = False
            while not self._stopping:
                self._handle_events(engine, wait=not busy)
                progressed = engine.step()
                self._send_tokenizers(engine)
                busy = progressed or engine.idle()
                self._send_stats(engine, idle=not progressed)
        finally:
            self._listener.close()
            Path(self._path).unlink(missing_ok=True)
            for client in self._clients.values():
                client.close()
            for client in self._clients.values():
                client.join()
            engine.adapters.close()

    def _handle_events(self, engine: Engine, *, wait: bool) -> None:
        """Handles all that has come in; waits for something first if there is nothing to step."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=_IDLE_S) if wait else self._events.get_nowait()
            while True:
                self._handle(engine, event)
                event = self._events.get_nowait()

    def _handle(self, engine: Engine, event: _Event) -> None:
        match event:
            case None:
                pass
            case _Connected(client):
                self._clients[client.id] = client
                client.send(Welcome(PROTOCOL_VERSION, engine.info, engine.adapters.tokenizers))
            case _Gone(client_id):
                engine.cancel_client(client_id)
                self._watch(engine, client_id, watching=False)
                if (gone := self._clients.pop(client_id, None)) is not None:
                    gone.close()
            case (client_id, message):
                try:
                    self._command(engine, client_id, message)
                except Exception as error:
                    _log.exception("a %s message failed", type(message).__name__)
                    self._refuse(client_id, message, InternalError(f"it failed: {type(error).__name__}"))

    def _command(self, engine: Engine, client: str, message: ToEngine) -> None:
        match message:
            case Submit(request):
                engine.submit(client, request)
            case Cancel(request_id):
                engine.cancel(client, request_id)
            case AdapterCommand():
                self._adapter_command(engine, client, message)
            case CheckIntegrity(call_id):
                self.emit(client, engine.check_integrity(call_id))
            case Shutdown():
                self._stopping = True
            case Hello():
                _log.warning("client %s said hello twice", client)

    def _refuse(self, client: str, message: ToEngine, error: InternalError) -> None:
        """Answers a message that met a fault of ours, so that nobody waits for its answer."""
        match message:
            case Submit(request):
                self.emit(client, Failed(request.request_id, error.info))
            case AdapterCommand(call_id):
                self.emit(client, AdapterReply(call_id, error=error.info))

    def _adapter_command(self, engine: Engine, client: str, command: AdapterCommand) -> None:
        adapters = engine.adapters

        def reply(answer: AdapterStatus | ServerError | list[AdapterStatus]) -> None:
            # Who hears that an adapter is there may send text for it at once.
            self._send_tokenizers(engine)
            if isinstance(answer, ServerError):
                self.emit(client, AdapterReply(command.call_id, error=answer.info))
            else:
                found = (answer,) if isinstance(answer, AdapterStatus) else tuple(answer)
                self.emit(client, AdapterReply(command.call_id, found))

        try:
            match command.op:
                case "list":
                    reply(adapters.list())
                case "get":
                    reply(adapters.get(command.name))
                case "pin":
                    adapters.pin(command.name, command.pinned, reply)
                case "chat_template":
                    template = adapters.chat_template(command.name)
                    self.emit(client, AdapterReply(command.call_id, chat_template=template))
                case "load":
                    adapters.load(command.name, command.source, reply, inplace=command.inplace)
                case "compose":
                    assert command.composition is not None
                    adapters.compose(command.name, command.composition, reply, inplace=command.inplace)
                case "adopt":
                    staged = Path(command.source)
                    adapters.adopt(command.name, staged, command.sha256, reply, inplace=command.inplace)
                case "watch" | "unwatch":
                    self._watch(engine, client, watching=command.op == "watch")
                case "unload":
                    engine.unload(command.name, command.grace_s, lambda: reply(adapters.list()))
                case "prefetch":
                    reply(adapters.prefetch(command.names, to_device=command.to_device))
                case op:
                    reply(InternalError(f"there is no adapter operation {op!r}"))
        except ServerError as error:
            reply(error)

    def _watch(self, engine: Engine, client: str, *, watching: bool) -> None:
        """Begins or ends telling a client of changes; one that begins is told of all there is."""
        if watching:
            self._send_changes(engine)
            self._watchers.add(client)
            engine.adapters.watch(True)
            self.emit(client, AdapterChanges(tuple(engine.adapters.list()), all=True))
        elif client in self._watchers:
            self._watchers.remove(client)
            if not self._watchers:
                engine.adapters.watch(False)

    def _send_tokenizers(self, engine: Engine) -> None:
        changed = engine.adapters.drain_tokenizers()
        if changed:
            for client in self._clients.values():
                client.send(TokenizersChanged(changed))

    def _send_changes(self, engine: Engine) -> None:
        if self._watchers:
            changes = engine.adapters.drain_changes()
            if changes.adapters or changes.removed:
                for client in self._watchers:
                    self.emit(client, changes)

    def _send_stats(self, engine: Engine, *, idle: bool) -> None:
        now_s = time.monotonic()
        if now_s - self._last_stats_s >= _STATS_EVERY_S or idle:
            self._last_stats_s = now_s
            self._send_changes(engine)
            stats = engine.stats()
            for client in self._clients.values():
                client.send(stats)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), name="engine-reader", daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        """One connection's reader: the handshake, then every message to the loop."""
        client: _Client | None = None
        try:
            stream = connection.makefile("rb")
            hello = _read_frame(stream)
            if (
                not isinstance(hello, Hello)
                or hello.version != PROTOCOL_VERSION
                or not hmac.compare_digest(hello.token, self._token)
            ):
                _log.warning("a connection was refused: wrong token or protocol version")
                return
            client = _Client(hello.client_id, connection)
            self._events.put(_Connected(client))
            while True:
                self._events.put((client.id, _read_frame(stream)))
        except (OSError, EOFError):
            pass
        except msgspec.DecodeError as error:
            _log.warning("a connection is closed: it sent what is no message (%s)", error)
        finally:
            if client is not None:
                self._events.put(_Gone(client.id))
            else:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()


def _read_frame(stream: BinaryIO) -> ToEngine:
    """Raises: EOFError at the end of the stream, msgspec.DecodeError for what is no message."""
    header = stream.read(4)
    length = int.from_bytes(header, "big")
    if len(header) < 4:
        raise EOFError
    if length > _MAX_FRAME:
        raise msgspec.DecodeError(f"a frame of {length} bytes")
    body = stream.read(length)
    if len(body) < length:
        raise EOFError
    return decode_to_engine(body)
