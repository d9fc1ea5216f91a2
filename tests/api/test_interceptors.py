"""The interceptor on all four kinds of calls, and on handlers written either way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from loraplex_server.api.lifecycle import Backend, Lifecycle
from loraplex_server.api.rpc.interceptors import CallInterceptor
from loraplex_server.api.rpc.stalls import StallWatch
from loraplex_server.api.rpc.status import retry_pushback
from loraplex_server.api.security.authentication import Authenticator
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import NoTracing
from loraplex_server.core.errors import AlreadyExistsError, ErrorInfo

KINDS = ["UnaryUnary", "UnaryStream", "UnaryWrites", "StreamUnary", "StreamStream"]


async def act(word: bytes) -> bytes:
    if word == b"fail":
        raise AlreadyExistsError("there is one", resource=("thing", "x"))
    if word == b"crash":
        raise RuntimeError("secret detail")
    if word == b"hang":
        await asyncio.Event().wait()
    return word.upper()


async def unary_unary(request: bytes, context: Any) -> bytes:
    return await act(request)


async def unary_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    yield await act(request)


async def unary_writes(request: bytes, context: Any) -> None:
    await context.write(b"first")
    await context.write(await act(request))


async def stream_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b"".join([await act(request) async for request in requests])


async def stream_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    async for request in requests:
        yield await act(request)


HANDLERS = grpc.method_handlers_generic_handler(
    "loraplex.test.Kinds",
    {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary_unary),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(unary_stream),
        "UnaryWrites": grpc.unary_stream_rpc_method_handler(unary_writes),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(stream_unary),
        "StreamStream": grpc.stream_stream_rpc_method_handler(stream_stream),
    },
)


def call(channel: grpc.Channel, kind: str, word: bytes, timeout: float = 20) -> list[bytes]:
    path = f"/loraplex.test.Kinds/{kind}"
    match kind:
        case "UnaryUnary":
            return [channel.unary_unary(path)(word, timeout=timeout)]
        case "UnaryStream" | "UnaryWrites":
            return list(channel.unary_stream(path)(word, timeout=timeout))
        case "StreamUnary":
            return [channel.stream_unary(path)(iter([word]), timeout=timeout)]
    return list(channel.stream_stream(path)(iter([word]), timeout=timeout))


def counted(registry: CollectorRegistry, kind: str, code: str) -> float:
    labels = {"method": f"/loraplex.test.Kinds/{kind}", "code": code}
    return registry.get_sample_value("loraplex_grpc_calls_total", labels) or 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_answers_errors_metrics_and_drain(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        lifecycle, metrics = Lifecycle(), Metrics()
        calls = CallInterceptor(lifecycle, metrics, Authenticator(None), NoTracing(), StallWatch(0))
        server = grpc.aio.server(interceptors=[calls])
        server.add_generic_rpc_handlers((HANDLERS,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        async def code_of(word: bytes, timeout: float = 20) -> grpc.RpcError:
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(call, channel, kind, word, timeout)
            return caught.value

        # In a thread: grpc.aio's own client says INTERNAL where a call is refused while it still writes.
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            error = await code_of(b"word")
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is starting")

            lifecycle.serve(Backend(None, None, None, None, None))
            assert (await asyncio.to_thread(call, channel, kind, b"word"))[-1] == b"WORD"
            error = await code_of(b"fail")
            assert (error.code(), error.details()) == (grpc.StatusCode.ALREADY_EXISTS, "there is one")
            error = await code_of(b"crash")
            assert error.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in str(error.details())
            assert "secret detail" in caplog.text
            error = await code_of(b"hang", timeout=0.5)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(lifecycle.wait_idle(), 10)

            lifecycle.drain()
            error = await code_of(b"word")
            assert (error.code(), error.details()) == (
                grpc.StatusCode.UNAVAILABLE,
                "the server is shutting down",
            )
        await server.stop(None)
        expected = {
            "OK": 1,
            "ALREADY_EXISTS": 1,
            "INTERNAL": 1,
            "DEADLINE_EXCEEDED": 1,
            "UNAVAILABLE": 2,
        }
        # A client has its answer before the server has counted it.
        async with asyncio.timeout(20):
            while (found := {code: counted(metrics.registry, kind, code) for code in expected}) != expected:
                assert all(found[code] <= times for code, times in expected.items()), found
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_retries_wait_as_long_as_the_server_says() -> None:
    """A little more, each its own: those who are refused together shall not come back together."""
    pauses = set()
    for _ in range(50):
        ((key, value),) = retry_pushback(ErrorInfo("UNAVAILABLE", "starting", retry_after_s=2.0))
        assert key == "grpc-retry-pushback-ms"
        assert 2000 <= int(value) <= 2500
        pauses.add(value)
    assert len(pauses) > 1
    assert retry_pushback(ErrorInfo("RESOURCE_EXHAUSTED", "full", retry_after_s=1.0))
    assert not retry_pushback(ErrorInfo("UNAVAILABLE", "gone"))
    assert not retry_pushback(ErrorInfo("ABORTED", "lost", retry_after_s=1.0))
