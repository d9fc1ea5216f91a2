"""The HTTP port: uvicorn in the event loop that the server has, on a socket that the server bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

CERTIFICATE_KEY = "loraplex.certificate"
"""Key of the client's certificate in the scope, as `ssl.SSLSocket.getpeercert` gives it."""

_KEEP_ALIVE_S = 75
_MAX_HEADER_BYTES = 64 << 10


class HttpListener:
    """Serves an application from `start` to `close`.

    Args:
        max_connections: more are answered with 503.
        stop_grace_s: time that requests have to finish when it closes; then they are cut off.
    """

    def __init__(
        self,
        app: ASGIApp,
        listening: socket.socket,
        tls: ssl.SSLContext | None,
        *,
        max_connections: int,
        stop_grace_s: float,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=max_connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(stop_grace_s)),
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = _Server(config)
        self._socket = listening
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Returns the port once requests are answered."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)
        return int(self._socket.getsockname()[1])

    async def close(self) -> None:
        """Takes no more connections, and returns when those there are have ended."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    """A server of uvicorn's that leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Tells the application which certificate the client has shown."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        encrypted = transport.get_extra_info("ssl_object")
        certificate = encrypted.getpeercert() if encrypted is not None else None
        if certificate:
            self.app = _with_certificate(self.app, certificate)


def _with_certificate(app: Any, certificate: dict[str, Any]) -> Any:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope[CERTIFICATE_KEY] = certificate
        await app(scope, receive, send)

    return call
