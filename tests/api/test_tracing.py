"""Traces as a collector gets them: a real OTLP endpoint takes what a whole server sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from loraplex.v1 import generation_pb2
from loraplex_server.config import ApiConfig
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo, InvalidArgumentError
from loraplex_server.core.request import FinishReason, Request
from loraplex_server.wire.messages import Failed, Times

pytest.importorskip("opentelemetry.sdk", reason="needs the tracing extra")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

TIMES = Times(
    queue_s=0.25, adapter_wait_s=0.125, first_token_s=0.5, total_s=1.0, preemptions=2, cached_prompt_tokens=3
)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
SERVER = trace_pb2.Span.SPAN_KIND_SERVER


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent. All of it is there once the server has ended."""

    def __init__(self) -> None:
        self.raw = b""
        self.service: dict[str, Any] = {}
        self.spans: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.raw += request.SerializeToString()
        for resource in request.resource_spans:
            self.service = attributes(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> Any:
        [span] = [span for span in self.spans if span.name == name]
        return span

    def children(self, span: Any) -> dict[str, Any]:
        return {child.name: child for child in self.spans if child.parent_span_id == span.span_id}


def attributes(owner: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {entry.key: plain(entry.value) for entry in owner.attributes}


def seconds(span: Any) -> float:
    return float(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Collector, str]]:
    # However busy the machine is, the server waits until all is delivered.
    monkeypatch.setattr("loraplex_server.api.telemetry.tracing.otlp._CLOSE_S", 60.0)
    servicer = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer, f"http://127.0.0.1:{port}"
        server.stop(None).wait()


async def answers(engine: Any, core: Request) -> None:
    engine.tokens(core, 40, times=TIMES)
    engine.tokens(core, 41, finish=FinishReason.LENGTH, times=TIMES)


def message(**fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(text="the secret prompt", **fields)


def test_a_call_and_its_generation(serving: Any, collector: tuple[Collector, str]) -> None:
    found, endpoint = collector

    async def main() -> None:
        async with serving(answers, otlp_endpoint=endpoint, model_name="tiny") as server:
            uses = [
                generation_pb2.AdapterWeight(adapter="sql"),
                generation_pb2.AdapterWeight(adapter="polite"),
            ]
            sampling = generation_pb2.SamplingParams(temperature=0.5, top_k=7)
            metadata = (("traceparent", SAMPLED), ("x-request-id", "r-1"))
            call = server.generation.Generate(message(adapters=uses, sampling=sampling), metadata=metadata)
            async for _ in call:
                pass

    asyncio.run(main())
    assert found.service["service.name"] == "loraplex"
    call = found.named("loraplex.v1.GenerationService/Generate")
    assert (call.trace_id.hex(), call.parent_span_id.hex(), call.kind) == (TRACE, PARENT, SERVER)
    assert attributes(call) == {
        "rpc.system.name": "grpc",
        "rpc.method": "loraplex.v1.GenerationService/Generate",
        "rpc.response.status_code": "OK",
        "loraplex.request_id": "r-1",
    }
    [generation] = found.children(call).values()
    assert generation.name == "text_completion tiny"
    said = attributes(generation)
    assert said.pop("gen_ai.usage.input_tokens") > 3
    assert said.pop("gen_ai.request.max_tokens") > 0
    assert said.pop("gen_ai.response.time_to_first_chunk") > 0
    assert said == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "loraplex",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": "r-1",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 7,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
        "loraplex.adapters": ["sql", "polite"],
        "loraplex.adapter_weights": [1.0, 1.0],
        "loraplex.preemptions": 2,
    }
    parts = found.children(generation)
    assert set(parts) == {"tokenize", "queue", "prefill", "decode"}
    assert seconds(parts["queue"]) == pytest.approx(0.25, abs=1e-6)
    assert seconds(parts["prefill"]) == pytest.approx(0.25, abs=1e-6)
    wait = found.children(parts["queue"])["adapter wait"]
    assert seconds(wait) == pytest.approx(0.125, abs=1e-6)
    order = [parts[name].start_time_unix_nano for name in ("tokenize", "queue", "prefill", "decode")]
    assert order == sorted(order)
    assert parts["tokenize"].end_time_unix_nano == parts["queue"].start_time_unix_nano
    assert {span.trace_id.hex() for span in found.spans} == {TRACE}
    assert b"secret" not in found.raw


def test_http_requests_and_each_of_their_choices(
    serving: Any, collector: tuple[Collector, str], chat_checkpoint: Any
) -> None:
    found, endpoint = collector

    def post(at: str, path: str, body: dict[str, Any]) -> int:
        headers = {"content-type": "application/json", "traceparent": SAMPLED}
        request = urllib.request.Request(f"http://{at}{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                response.read()
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    async def main() -> None:
        options = {"otlp_endpoint": endpoint, "http_port": 0, "model": chat_checkpoint, "model_name": "tiny"}
        async with serving(answers, **options) as server:
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "secret"}], "n": 2}
            assert await asyncio.to_thread(post, server.http_at, "/v1/chat/completions", chat) == 200
            assert await asyncio.to_thread(post, server.http_at, "/v1/nothing", {}) == 404
            assert await asyncio.to_thread(post, server.http_at, "/health", {}) == 405

    asyncio.run(main())
    call = found.named("POST /v1/chat/completions")
    assert (call.trace_id.hex(), call.parent_span_id.hex(), call.kind) == (TRACE, PARENT, SERVER)
    said = attributes(call)
    assert said.pop("loraplex.request_id")
    assert said == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    generations = [span for span in found.spans if span.parent_span_id == call.span_id]
    assert [span.name for span in generations] == ["chat tiny"] * 2
    assert attributes(found.named("POST"))["http.response.status_code"] == 404
    assert b"secret" not in found.raw


def test_each_request_of_a_batch(serving: Any, collector: tuple[Collector, str]) -> None:
    found, endpoint = collector

    async def main() -> None:
        async with serving(answers, otlp_endpoint=endpoint) as server:
            batch = generation_pb2.GenerateBatchRequest(requests=[message(), message(logprobs=99), message()])
            async for _ in server.generation.GenerateBatch(batch, metadata=(("x-request-id", "b"),)):
                pass

    asyncio.run(main())
    call = found.named("loraplex.v1.GenerationService/GenerateBatch")
    generations = [span for span in found.spans if span.parent_span_id == call.span_id]
    assert {attributes(span)["gen_ai.response.id"] for span in generations} == {"b-0", "b-2"}


def test_the_caller_decides_what_is_sampled(serving: Any, collector: tuple[Collector, str]) -> None:
    found, endpoint = collector

    async def main() -> None:
        async with serving(answers, otlp_endpoint=endpoint) as server:
            for traceparent in (UNSAMPLED, "no traceparent"):
                metadata = (("traceparent", traceparent), ("x-request-id", traceparent[:2]))
                await server.generation.GenerateUnary(
                    generation_pb2.GenerateUnaryRequest(request=message()), metadata=metadata
                )

    asyncio.run(main())
    calls = [attributes(span)["loraplex.request_id"] for span in found.spans if span.kind == SERVER]
    assert calls == ["no"]
    assert TRACE not in {span.trace_id.hex() for span in found.spans}


def test_errors_are_the_servers_or_the_callers(serving: Any, collector: tuple[Collector, str]) -> None:
    found, endpoint = collector

    async def fails(engine: Any, core: Request) -> None:
        engine.send(Failed(core.request_id, ErrorInfo("INTERNAL", "a path in here")))

    async def main() -> None:
        async with serving(fails, otlp_endpoint=endpoint) as server:
            for request_id, request in (("bad", message(logprobs=99)), ("fails", message())):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await server.generation.GenerateUnary(
                        generation_pb2.GenerateUnaryRequest(request=request),
                        metadata=(("x-request-id", request_id),),
                    )

    asyncio.run(main())
    calls = {attributes(span)["loraplex.request_id"]: span for span in found.spans if span.kind == SERVER}
    assert attributes(calls["bad"])["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert calls["bad"].status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert not found.children(calls["bad"])
    assert calls["fails"].status.code == trace_pb2.Status.STATUS_CODE_ERROR
    [generation] = found.children(calls["fails"]).values()
    assert generation.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes(generation)["error.type"] == "INTERNAL"
    assert set(found.children(generation)) == {"tokenize"}
    assert b"a path in here" not in found.raw


def test_without_a_collector_calls_are_answered_and_the_server_ends(
    serving: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loraplex_server.api.telemetry.tracing.otlp._CLOSE_S", 0.05)

    async def main() -> None:
        # Nobody listens on the discard port.
        async with serving(answers, otlp_endpoint="http://127.0.0.1:9") as server:
            response = await server.generation.GenerateUnary(
                generation_pb2.GenerateUnaryRequest(request=message())
            )
            assert len(response.token_ids) == 2

    asyncio.run(main())
    assert "the last traces are dropped" in caplog.text


def test_the_log_names_the_trace(serving: Any, collector: tuple[Collector, str]) -> None:
    _, endpoint = collector
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(log._JsonFormatter().format(record)))

    logger, handler = logging.getLogger("loraplex_server.api.rpc.interceptors"), Keep()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel("INFO")

    async def main() -> None:
        async with serving(otlp_endpoint=endpoint) as server:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await server.generation.GenerateUnary(
                    generation_pb2.GenerateUnaryRequest(request=message(logprobs=99)),
                    metadata=(("traceparent", SAMPLED),),
                )

    try:
        asyncio.run(main())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert [line["trace_id"] for line in lines] == [TRACE]


def test_without_its_packages_the_server_says_so(
    new_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "loraplex_server.api.telemetry.tracing.otlp", raising=False)

    async def main() -> None:
        async with new_engine() as engine:
            task, _ = start_server(engine, otlp_endpoint="http://127.0.0.1:4317")
            assert await asyncio.wait_for(task, 10) == 1

    asyncio.run(main())
    assert "pip install '.[tracing]'" in caplog.text


@pytest.mark.parametrize(
    "endpoint", ["localhost:4317", "ftp://x:1", "http://", "http://user:pw@x:4317", "http://a b"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(InvalidArgumentError, match="otlp_endpoint"):
        ApiConfig(otlp_endpoint=endpoint)
