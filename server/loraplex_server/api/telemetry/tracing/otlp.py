"""Spans by OpenTelemetry's conventions, sent to a collector over OTLP by a thread of the SDK's.

call          loraplex.v1.GenerationService/Generate, POST /v1/completions
└ generation  chat MODEL, text_completion MODEL (one for each prompt and choice)
  ├ tokenize      from the arrival to the engine
  ├ queue         until it is first scheduled
  │ └ adapter wait    the part of it that its adapters took to be on the device
  ├ prefill       until the first token
  └ decode        until the last

The SDK's own environment variables hold: sampling (`OTEL_TRACES_SAMPLER`; as the caller decided, and else
all), headers for the collector, names, batches. A full queue drops spans and makes nobody wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from loraplex_server.api.telemetry.tracing.spans import CallSpan, Generated, GenerationSpan
from loraplex_server.core import log
from loraplex_server.core.request import Request

_log = logging.getLogger(__name__)

# Time to send the last spans when the server ends; the collector may be slow or gone.
_CLOSE_S = 5.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Codes that mean the server failed; the others are ordinary answers.
_FAILURES = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

_Attributes = dict[str, AttributeValue]
_w3c = TraceContextTextMapPropagator()
_call: contextvars.ContextVar[Span | None] = contextvars.ContextVar("call", default=None)


class OtlpTracing:
    """Traces to one collector.

    Args:
        endpoint: http:// or https:// and the collector's gRPC port.
        model: the base model's name.
    """

    def __init__(self, endpoint: str, model: str, version: str) -> None:
        named = Resource.create({"service.name": "loraplex", "service.version": version})
        self._exporter = OTLPSpanExporter(endpoint)
        self._provider = TracerProvider(
            # Attributes from the environment take precedence.
            resource=named.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("loraplex_server", version)
        self._model = model

    def rpc(self, method: str, metadata: Mapping[str, str]) -> CallSpan:
        """See `Tracing`."""
        name = method.removeprefix("/")
        return self._begin(name, metadata, {"rpc.system.name": "grpc", "rpc.method": name})

    def http(self, method: str, path: str, headers: Mapping[str, str]) -> CallSpan:
        """See `Tracing`."""
        known = method if method in _METHODS else "_OTHER"
        return self._begin(known, headers, {"http.request.method": known, "url.path": path})

    def _begin(self, name: str, carrier: Mapping[str, str], attributes: _Attributes) -> _Call:
        parent = _w3c.extract(carrier, Context())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        _call.set(span)
        if span.is_recording():
            log.trace_id.set(f"{span.get_span_context().trace_id:032x}")
        return _Call(span, name)

    def generation(self, request: Request, *, chat: bool, request_id: str, seconds: float) -> GenerationSpan:
        """See `Tracing`."""
        now_ns = time.time_ns()
        operation = "chat" if chat else "text_completion"
        call = _call.get()
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            Context() if call is None else set_span_in_context(call, Context()),
            start_time=now_ns - _ns(seconds),
        )
        if span.is_recording():
            span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "loraplex",
                    "gen_ai.request.model": self._model,
                    "gen_ai.response.model": self._model,
                    "gen_ai.response.id": request_id,
                    "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                    **_sampling(request),
                    "loraplex.adapters": [use.name for use in request.adapters],
                    "loraplex.adapter_weights": [use.weight for use in request.adapters],
                }
            )
        return _Generation(self._tracer, span, now_ns - _ns(seconds), now_ns)

    async def close(self) -> None:
        """See `Tracing`."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _CLOSE_S)
        if ending.is_alive():
            _log.warning("the last traces are dropped: the collector does not take them")
            self._exporter.shutdown()


class _Call:
    def __init__(self, span: Span, name: str) -> None:
        self._span = span
        self._name = name

    def end_rpc(self, code: str) -> None:
        attributes: _Attributes = {"rpc.response.status_code": code}
        self._end(attributes, code if code in _FAILURES else None)

    def end_http(self, route: str | None, status: int) -> None:
        attributes: _Attributes = {"http.response.status_code": status}
        if route is not None:
            attributes["http.route"] = route
            self._span.update_name(f"{self._name} {route}")
        self._end(attributes, str(status) if status >= 500 else None)

    def _end(self, attributes: _Attributes, error: str | None) -> None:
        if self._span.is_recording():
            request_id = log.request_id.get()
            self._span.set_attributes({**attributes, "loraplex.request_id": request_id})
            _fail(self._span, error)
        self._span.end()


class _Generation:
    def __init__(self, tracer: Tracer, span: Span, arrived_ns: int, submitted_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._arrived_ns = arrived_ns
        self._submitted_ns = submitted_ns

    def end(self, generated: Generated) -> None:
        if not self._span.is_recording():
            return
        now_ns, times = time.time_ns(), generated.times
        attributes: _Attributes = {
            "gen_ai.usage.output_tokens": generated.completion_tokens,
            "gen_ai.response.finish_reasons": [generated.outcome],
        }
        if generated.first_token_s is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = generated.first_token_s
        if times is not None:
            attributes["gen_ai.usage.cache_read.input_tokens"] = times.cached_prompt_tokens
            attributes["loraplex.preemptions"] = times.preemptions
        self._span.set_attributes(attributes)
        code = generated.outcome.upper()
        _fail(self._span, code if code in _FAILURES else None)
        self._parts(generated, now_ns)
        self._span.end(now_ns)

    def _parts(self, generated: Generated, now_ns: int) -> None:
        """Children, by the engine's times, which are known only now."""
        self._part("tokenize", self._span, self._arrived_ns, self._submitted_ns)
        times, begin_ns = generated.times, self._submitted_ns
        if times is None:
            return
        scheduled_ns = begin_ns + _ns(times.queue_s)
        queue = self._part("queue", self._span, begin_ns, scheduled_ns)
        if times.adapter_wait_s:
            wait_ns = _ns(min(times.adapter_wait_s, times.queue_s))
            self._part("adapter wait", queue, scheduled_ns - wait_ns, scheduled_ns)
        if generated.first_token_s is not None:
            first_ns = begin_ns + _ns(times.first_token_s)
            self._part("prefill", self._span, scheduled_ns, first_ns)
            self._part("decode", self._span, first_ns, max(first_ns, now_ns))

    def _part(self, name: str, parent: Span, begin_ns: int, end_ns: int) -> Span:
        span = self._tracer.start_span(name, set_span_in_context(parent, Context()), start_time=begin_ns)
        span.end(end_ns)
        return span


def _sampling(request: Request) -> _Attributes:
    sampling = request.sampling
    found: _Attributes = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
    }
    for name, value, usual in (
        ("top_k", sampling.top_k, 0),
        ("top_p", sampling.top_p, 1.0),
        ("presence_penalty", sampling.presence_penalty, 0.0),
        ("frequency_penalty", sampling.frequency_penalty, 0.0),
    ):
        if value != usual:
            found[f"gen_ai.request.{name}"] = value
    return found


def _fail(span: Span, error: str | None) -> None:
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
