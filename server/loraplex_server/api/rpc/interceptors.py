"""Around every call of every kind: its tenant, its request id, the mapping of errors, and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from loraplex_server.api.answers import timings
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests.request_id import request_id_or_new
from loraplex_server.api.rpc.stalls import StallWatch
from loraplex_server.api.rpc.status import code_of_cancellation, retry_pushback, to_status
from loraplex_server.api.security import authentication
from loraplex_server.api.security.authentication import Authenticator
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import NO_SPAN, Tracing
from loraplex_server.core import log
from loraplex_server.core.errors import (
    ErrorInfo,
    InternalError,
    InvalidArgumentError,
    ServerError,
    UnimplementedError,
)

_log = logging.getLogger(__name__)

_REQUEST_ID_KEY = "x-request-id"
# Health and reflection answer whatever the server is doing, and probes carry no token.
_GUARDED = "/loraplex."
_OPEN_TO_ALL = "/grpc.health."

# Names that clients make up are no labels of metrics.
_NO_METHOD = "/unknown"

_ABORT_S = 2.0

# Stands for a message that cannot be decoded.
_NO_MESSAGE = object()

_Context = Any
_Behavior = Callable[[Any, _Context], Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all services.

    A client may send its own request id as metadata `x-request-id`; it is sent back so, with the status, and
    with where the time went (`answers.timings`).
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        metrics: Metrics,
        authenticator: Authenticator,
        tracing: Tracing,
        stalls: StallWatch,
    ) -> None:
        self._stalls = stalls
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._authenticator = authenticator
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._unimplemented)
        method = handler_call_details.method
        codec = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            if handler.request_streaming:
                behavior = self._streaming(method, handler.stream_stream)
                return grpc.stream_stream_rpc_method_handler(behavior, **codec)
            behavior = self._streaming(method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behavior, **codec)
        if handler.request_streaming:
            behavior = self._unary(method, handler.stream_unary)
            return grpc.stream_unary_rpc_method_handler(behavior, **codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)

    async def _unimplemented(self, _requests: Any, context: _Context) -> None:
        """gRPC's own answer would have no details."""
        async with self._call(_NO_METHOD, context):
            raise UnimplementedError("this server has no such method; is it older than its client?")

    def _unary(self, method: str, behavior: _Behavior) -> _Behavior:
        async def answer(request: Any, context: _Context) -> Any:
            async with self._call(method, context):
                return await behavior(_checked(request), context)

        return answer

    def _streaming(self, method: str, behavior: _Behavior) -> _Behavior:
        # Messages go out through `context.write`: so a cancellation always arrives at one of our awaits,
        # and what the handler holds is released at once, not when its generator is collected.
        async def answer(request: Any, context: _Context) -> None:
            async with self._call(method, context):
                responses = behavior(_checked(request), context)
                if not hasattr(responses, "__aiter__"):
                    await responses
                    return
                task = asyncio.current_task()
                assert task is not None
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        try:
                            await self._stalls.write(task, context, response)
                        except (grpc.aio.UsageError, grpc.aio.InternalError) as gone:
                            # The call ended meanwhile: its client left, or its deadline passed.
                            raise asyncio.CancelledError from gone

        return answer

    @contextlib.asynccontextmanager
    async def _call(self, method: str, context: _Context) -> AsyncIterator[None]:
        started = time.perf_counter()
        log.request_id.set(_request_id(context))
        timings.begin()
        guarded = method.startswith(_GUARDED)
        span = self._tracing.rpc(method, _texts(context)) if guarded else NO_SPAN
        code = "OK"
        try:
            if not method.startswith(_OPEN_TO_ALL):
                tenant = self._authenticator.tenant_of(_authorization(context), lambda: _names(context))
                authentication.tenant.set(tenant)
            with self._lifecycle.call() if guarded else contextlib.nullcontext():
                yield
            context.set_trailing_metadata(_trailers(started))
        except asyncio.CancelledError:
            code = code_of_cancellation(context)
            raise
        except grpc.aio.AbortError:
            code = context.code().name
            raise
        except ServerError as error:
            code = error.code
            if code == InternalError.code:
                _log.exception("%s failed", method)
            else:
                _log.info("%s: %s: %s", method, code, error)
            self._metrics.observe_error(error.info)
            await _abort(context, error.info, started)
        except Exception:
            code = InternalError.code
            _log.exception("%s failed", method)
            info = ErrorInfo(code, "")
            self._metrics.observe_error(info)
            await _abort(context, info, started)
        finally:
            self._metrics.observe_call(method, code, time.perf_counter() - started)
            span.end_rpc(code)


def _authorization(context: _Context) -> str | None:
    return next((str(v) for k, v in context.invocation_metadata() or () if k == "authorization"), None)


def _texts(context: _Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _names(context: _Context) -> Iterator[str]:
    presented = context.auth_context()
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for name in presented.get(key, ()):
            yield name.decode(errors="replace")


def _tolerant(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """gRPC would answer INTERNAL, and log a stack trace, for what a client got wrong."""
    if decode is None:
        return None

    def tolerant(body: bytes) -> Any:
        try:
            return decode(body)
        except DecodeError:
            return _NO_MESSAGE

    return tolerant


def _checked(request: Any) -> Any:
    """The request, or the requests of a stream, each of which has to be a message."""
    if request is _NO_MESSAGE:
        raise _undecodable()
    return _checked_stream(request) if hasattr(request, "__aiter__") else request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _NO_MESSAGE:
            raise _undecodable()
        yield request


def _undecodable() -> InvalidArgumentError:
    return InvalidArgumentError.field("request", "its bytes are no message of this method")


def _request_id(context: _Context) -> str:
    return request_id_or_new(_texts(context).get(_REQUEST_ID_KEY))


def _trailers(started: float) -> tuple[tuple[str, str], ...]:
    return (_REQUEST_ID_KEY, log.request_id.get()), (timings.KEY, timings.told(time.perf_counter() - started))


async def _abort(context: _Context, error: ErrorInfo, started: float) -> None:
    status = to_status(error, log.request_id.get())
    metadata = (*status.trailing_metadata, *retry_pushback(error), *_trailers(started))
    try:
        async with asyncio.timeout(_ABORT_S):
            await context.abort(status.code, status.details, metadata)
    except TimeoutError as unread:
        # The status waits behind messages that the client does not read; this task does not wait for it.
        raise asyncio.CancelledError from unread
    except (grpc.aio.UsageError, grpc.aio.InternalError) as gone:
        # The call ended meanwhile; gRPC would log a stack trace for what it raised here.
        raise asyncio.CancelledError from gone
