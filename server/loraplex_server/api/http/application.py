"""The ASGI application: paths and their endpoints."""

from __future__ import annotations

from typing import Any

import msgspec
import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loraplex_server.api.http.errors import to_body
from loraplex_server.api.http.generation import CHAT, COMPLETIONS, GenerationEndpoint, HttpSettings
from loraplex_server.api.http.middleware import CallMiddleware
from loraplex_server.api.http.models import Models
from loraplex_server.api.http.openapi import document
from loraplex_server.api.http.schema import Health
from loraplex_server.api.services import Services
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo

_CODES = {404: "NOT_FOUND", 405: "INVALID_ARGUMENT"}


def application(services: Services, settings: HttpSettings) -> Starlette:
    """The whole HTTP API, for an ASGI server to run."""
    lifecycle, metrics = services.lifecycle, services.metrics
    models = Models(lifecycle, settings)
    openapi = msgspec.json.encode(document(services.version))

    async def health(request: Request) -> Response:
        serving = lifecycle.serving
        body = msgspec.json.encode(Health("serving" if serving else "not serving"))
        return Response(body, 200 if serving else 503, media_type="application/json")

    async def scrape(request: Request) -> Response:
        text = prometheus_client.generate_latest(metrics.registry)
        return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

    async def describe(request: Request) -> Response:
        return Response(openapi, media_type="application/json")

    routes = [
        Route("/v1/completions", GenerationEndpoint(COMPLETIONS, services, settings), methods=["POST"]),
        Route("/v1/chat/completions", GenerationEndpoint(CHAT, services, settings), methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{model:path}", models.get, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", scrape, methods=["GET"]),
        Route("/openapi.json", describe, methods=["GET"]),
    ]
    calls = Middleware(
        CallMiddleware,
        lifecycle=lifecycle,
        metrics=metrics,
        authenticator=services.authenticator,
        routes={route.endpoint: route.path for route in routes},
        tracing=services.tracing,
    )
    handlers: dict[Any, Any] = {HTTPException: _no_such_thing}
    app = Starlette(routes=routes, middleware=[calls], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """A path that is not there, or not by this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]} is not served; GET /openapi.json says what is"
    body = to_body(ErrorInfo(_CODES.get(error.status_code, "INVALID_ARGUMENT"), what), log.request_id.get())
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")
