"""Around every HTTP request: its id, its tenant, the mapping of errors, and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp

from loraplex_server.api.http.errors import headers_of, status_of, to_body
from loraplex_server.api.http.events import ClientGoneError, Receive, Send
from loraplex_server.api.http.generation import MODEL_KEY
from loraplex_server.api.http.listener import CERTIFICATE_KEY
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests.request_id import request_id_or_new
from loraplex_server.api.security import authentication
from loraplex_server.api.security.authentication import Authenticator
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import NO_SPAN, Tracing
from loraplex_server.core import log
from loraplex_server.core.errors import InternalError, ServerError

_log = logging.getLogger(__name__)

_REQUEST_ID = "x-request-id"
# Probes carry no token.
_OPEN_TO_ALL = "/health"
# Only these wait for the engine, and are waited for when the server drains.
_GUARDED = "/v1/"
_CLIENT_GONE = 499


class CallMiddleware:
    """Wraps the application. A client may send its own `x-request-id`; it is sent back so.

    Args:
        routes: by endpoint, the path that it has in the metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        lifecycle: Lifecycle,
        metrics: Metrics,
        authenticator: Authenticator,
        routes: dict[Any, str],
        tracing: Tracing,
    ) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._authenticator = authenticator
        self._routes = routes
        self._tracing = tracing

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = Headers(scope=scope)
        request_id = request_id_or_new(headers.get(_REQUEST_ID))
        log.request_id.set(request_id)
        status = 0

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_REQUEST_ID] = request_id
            await send(message)

        path: str = scope["path"]
        guarded = path.startswith(_GUARDED)
        span = self._tracing.http(scope["method"], path, headers) if guarded else NO_SPAN
        try:
            if path != _OPEN_TO_ALL:
                tenant = self._authenticator.tenant_of(
                    headers.get("authorization"), lambda: _names(scope.get(CERTIFICATE_KEY) or {})
                )
                authentication.tenant.set(tenant)
            with self._lifecycle.call() if guarded else contextlib.nullcontext():
                await self._app(scope, receive, send_on)
        except (ClientGoneError, asyncio.CancelledError):
            # Requests still running when the server ends are cancelled, and their connections closed.
            status = _CLIENT_GONE
        except ServerError as error:
            if error.code == InternalError.code:
                _log.exception("%s failed", path)
            else:
                _log.info("%s: %s: %s", path, error.info.code, error)
            await self._refuse(error, scope, receive, send_on)
        except Exception:
            _log.exception("%s failed", path)
            if status:
                # Break the connection: the client must not take a part for the whole answer.
                self._metrics.observe_error(InternalError("").info)
                raise
            await self._refuse(InternalError(""), scope, receive, send_on)
        finally:
            route, status = self._routes.get(scope.get("endpoint")), status or _CLIENT_GONE
            self._metrics.observe_http(route or "other", status, time.perf_counter() - started)
            span.end_http(route, status)

    async def _refuse(self, error: ServerError, scope: Any, receive: Receive, send: Send) -> None:
        self._metrics.observe_error(error.info)
        body = to_body(error.info, log.request_id.get(), scope.get(MODEL_KEY, ""))
        response = Response(
            body, status_of(error), headers=headers_of(error.info), media_type="application/json"
        )
        await response(scope, receive, send)


def _names(certificate: dict[str, Any]) -> Iterator[str]:
    """Of a peer's certificate as Python's ssl module gives it: common names, then alternative ones."""
    for attributes in certificate.get("subject", ()):
        for key, value in attributes:
            if key == "commonName":
                yield value
    for _, value in certificate.get("subjectAltName", ()):
        yield value
