"""The metrics port's HTTP server, in threads of its own: it answers whatever the event loop is doing."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import prometheus_client

from loraplex_server.api.telemetry.dashboard.page import headers, page

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

# A client that says nothing for so long holds a thread no longer.
_PATIENCE_S = 30.0


class MetricsPort:
    """Serves `/metrics` and, at `/`, the page that shows them, until it is closed.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, registry: prometheus_client.CollectorRegistry) -> None:
        self._metrics = prometheus_client.make_wsgi_app(registry)
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = type("_Server", (_Server,), {"address_family": family})
        self._server: WSGIServer = server(address[:2], _Handler)
        self._server.set_app(self._answer)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The one that it listens on."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stops answering, and closes the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start)
            return answer
        body, status, fields = b"GET / or /metrics\n", "404 Not Found", [("Content-Type", "text/plain")]
        if path == "/":
            body, status, fields = page(), "200 OK", list(headers())
            if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                body, status, fields = b"", "405 Method Not Allowed", [("Allow", "GET, HEAD")]
        start(status, [*fields, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    # Whoever is still reading when the server ends is cut off.
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go: no stack trace of that on stderr."""


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is not worth a line each."""
