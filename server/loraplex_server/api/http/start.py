"""The HTTP port from the server's settings."""

from __future__ import annotations

import contextlib
import socket

from loraplex_server.api.address import address
from loraplex_server.api.http.application import application
from loraplex_server.api.http.generation import HttpSettings
from loraplex_server.api.http.listener import HttpListener
from loraplex_server.api.security import tls
from loraplex_server.api.services import Services
from loraplex_server.config import ApiConfig
from loraplex_server.core.errors import FailedPreconditionError

# Connections that wait to be taken.
_BACKLOG = 1024


async def listen_http(
    api: ApiConfig,
    services: Services,
    model_name: str,
    stack: contextlib.AsyncExitStack,
    *,
    max_connections: int,
    stop_grace_s: float,
) -> int:
    """Starts the HTTP server, whose API answers 503 for now; returns the port.

    Args:
        model_name: the base model's, as clients name it.
        stack: ends it; `max_connections` and `stop_grace_s` as those of `HttpListener`.

    Raises:
        FailedPreconditionError: the address cannot be listened on.
    """
    app = application(services, HttpSettings(model_name, api.max_message_bytes, api.stall_s))
    context = None if api.tls is None else tls.http_context(api.tls)
    listening = _bind(api)
    stack.callback(listening.close)
    _find_dead_peers(listening)
    listener = HttpListener(
        app, listening, context, max_connections=max_connections, stop_grace_s=stop_grace_s
    )
    stack.push_async_callback(listener.close)
    return await listener.start()


def _bind(api: ApiConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
    try:
        return socket.create_server((api.host, api.http_port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise FailedPreconditionError(
            f"{address(api.host, api.http_port)} cannot be listened on ({error.strerror}); choose "
            "another --host or --http-port"
        ) from error


def _find_dead_peers(listening: socket.socket) -> None:
    """Turns TCP keepalive on, so that a client that vanished is noticed."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
