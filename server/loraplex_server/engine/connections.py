"""The engine's side of its clients' connections: a unix socket, and for each client a thread that reads and
one that writes.
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
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from loraplex_server.wire.frames import decode_to_engine, encode
from loraplex_server.wire.messages import PROTOCOL_VERSION, FromEngine, Hello, ToEngine

_log = logging.getLogger(__name__)

_MAX_FRAME = 64 << 20
"""Largest message in bytes: a hundred times what a prompt of 100,000 tokens takes."""

_MAX_BACKLOG = 100_000
"""Messages that wait to be written to a client that reads nothing: half an hour of steps of 20 ms."""


class Connection:
    """One client. `send` only queues; a thread of its own writes."""

    def __init__(self, client_id: str, connection: socket.socket) -> None:
        self.id = client_id
        self._connection = connection
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._thread.start()

    def send(self, message: FromEngine) -> None:
        """Queues a message; a client that has too many unread is dropped instead."""
        if self._outbox.qsize() > _MAX_BACKLOG:
            self.close()
        else:
            self._outbox.put(encode(message))

    def close(self) -> None:
        """Ends the connection once what is queued has been written, or could not be."""
        self._outbox.put(None)

    def join(self) -> None:
        """Waits for the end, five seconds at most."""
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


@dataclasses.dataclass(frozen=True)
class Connected:
    """A client said hello; a `Gone` with its id follows some time."""

    connection: Connection


@dataclasses.dataclass(frozen=True)
class Received:
    """A client sent a message."""

    client: str
    message: ToEngine


@dataclasses.dataclass(frozen=True)
class Gone:
    """A client's connection has ended."""

    client: str


Event = Connected | Received | Gone


class Listener:
    """Accepts clients on a unix socket that only this user can open.

    Args:
        token: what a client has to know.
        put: called, from the threads that read, with every event.
    """

    def __init__(self, socket_path: str, token: str, put: Callable[[Event], None]) -> None:
        self._path = socket_path
        self._token = token
        self._put = put
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(socket_path)
        os.chmod(socket_path, 0o600)
        # From here on clients may connect; they are answered once `start` is called.
        self._socket.listen()

    def start(self) -> None:
        threading.Thread(target=self._accept, name="engine-accept", daemon=True).start()

    def close(self) -> None:
        """Nobody can connect any more; connections that are there stay."""
        self._socket.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), name="engine-reader", daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        """One connection's reader: the handshake, then every message."""
        client: Connection | None = None
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
            client = Connection(hello.client_id, connection)
            self._put(Connected(client))
            while True:
                self._put(Received(client.id, _read_frame(stream)))
        except (OSError, EOFError):
            pass
        except msgspec.DecodeError as error:
            _log.warning("a connection is closed: it sent what is no message (%s)", error)
        finally:
            if client is not None:
                self._put(Gone(client.id))
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
