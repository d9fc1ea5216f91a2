"""Hooks and gRPC's own interceptors: what a caller's tracing sees of every call."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from loraplex import AsyncClient, CallHook, CallInfo, Client
from loraplex.errors import LoraplexError, NotFoundError, RequestCancelledError
from loraplex.v1 import adapters_pb2, generation_pb2

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Tracing(CallHook):
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[tuple[str, str, type[LoraplexError] | None]] = []

    def on_request(self, call: CallInfo) -> None:
        self.begun.append(call.method)
        call.metadata["traceparent"] = TRACE

    def on_response(self, call: CallInfo, error: LoraplexError | None) -> None:
        assert call.seconds > 0
        method = call.method.removeprefix("loraplex.v1.")
        self.ended.append((method, call.request_id, None if error is None else type(error)))


@pytest.fixture
def tracing() -> Tracing:
    return Tracing()


@pytest.fixture
def traced(connect: Any, tracing: Tracing) -> Any:
    return connect(hooks=[tracing], metadata={"team": "search"})


def test_every_call_is_told_of(drive: Any, server: Any, traced: Any, tracing: Tracing) -> None:
    server.answers["ListAdapters"] = lambda request, context: adapters_pb2.ListAdaptersResponse()
    drive(lambda: traced.generate("x", request_id="mine"))
    drive(lambda: traced.stream("x").collect())
    drive(lambda: traced.adapters.list())
    assert tracing.ended == [
        ("GenerationService/GenerateUnary", "mine", None),
        ("GenerationService/Generate", "made-by-server", None),
        ("AdapterService/ListAdapters", "", None),
    ]
    assert tracing.begun[0] == "loraplex.v1.GenerationService/GenerateUnary"
    assert all((sent["traceparent"], sent["team"]) == (TRACE, "search") for sent in server.metadata)


def test_of_errors_once(drive: Any, server: Any, abort: Any, traced: Any, tracing: Tracing) -> None:
    server.answers["Generate"] = lambda request, context: abort(context, grpc.StatusCode.NOT_FOUND, "no")
    for act in (
        lambda: traced.generate("x"),
        lambda: traced.stream("x").collect(),
        lambda: traced.map(["x"]).collect(),
    ):
        with pytest.raises(NotFoundError):
            drive(act)
    assert [error for *_, error in tracing.ended] == [NotFoundError] * 3


def test_of_what_its_caller_left(drive: Any, server: Any, traced: Any, tracing: Tracing) -> None:
    first = generation_pb2.GenerateResponse(text="first", request_id="r1")
    server.answers["Generate"] = lambda request, context: server.hold(context, first)
    stream = drive(lambda: traced.stream("x"))
    assert drive.next(stream).text == "first"
    drive(stream.close)
    drive(stream.close)
    assert tracing.ended == [("GenerationService/Generate", "r1", RequestCancelledError)]


def test_what_one_hook_raises_ends_the_call(drive: Any, server: Any, connect: Any) -> None:
    class Broken(CallHook):
        def on_request(self, call: CallInfo) -> None:
            raise ValueError("no tracer")

    client = connect(hooks=[Broken()])
    with pytest.raises(ValueError, match="no tracer"):
        drive(lambda: client.generate("x"))
    assert not server.calls


class Stamping(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """gRPC's own kind, as an OpenTelemetry instrumentation brings it."""

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self.stamped(details), request)

    intercept_unary_stream = intercept_unary_unary

    @staticmethod
    def stamped(details: Any) -> Any:
        class Details(grpc.ClientCallDetails):
            method = details.method
            timeout = details.timeout
            metadata = (*details.metadata, ("stamp", "blocking"))
            credentials = details.credentials
            wait_for_ready = details.wait_for_ready
            compression = details.compression

        return Details()


class UnaryStamping(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        details.metadata.add("stamp", "awaited")
        return await continuation(details, request)


class StreamStamping(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        details.metadata.add("stamp", "awaited")
        return await continuation(details, request)


def test_interceptors_of_grpc(server: Any) -> None:
    with Client(server.address, interceptors=[Stamping()]) as client:
        assert client.generate("x").text == "Grüße"
        assert client.stream("x").collect().text == "Grüße"
        assert client.map(["x"]).collect()[0].text == "Grüße"
    assert [sent["stamp"] for sent in server.metadata] == ["blocking"] * 3


def test_interceptors_of_grpc_aio(server: Any, abort: Any) -> None:
    async def run() -> None:
        stamping = [UnaryStamping(), StreamStamping()]
        async with AsyncClient(server.address, interceptors=stamping) as client:
            assert (await client.generate("x")).text == "Grüße"
            assert (await client.stream("x").collect()).text == "Grüße"
            assert (await client.map(["x"]).collect())[0].text == "Grüße"
            server.answers["Generate"] = lambda request, context: abort(
                context, grpc.StatusCode.NOT_FOUND, "no"
            )
            with pytest.raises(NotFoundError):
                await client.stream("x").collect()

    asyncio.run(run())
    assert [sent["stamp"] for sent in server.metadata] == ["awaited"] * 4
