"""The life of a call: deadlines, cancellation, retries, waiting, closing."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from loraplex import AsyncClient, Client, RetryPolicy
from loraplex._channel import REPEATABLE
from loraplex.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2

SAFETY_S = 20.0
QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


@pytest.fixture
def endless(server: Any) -> Any:
    """The server sends one chunk and then holds the call."""

    first = generation_pb2.GenerateResponse(text="first", token_ids=[1], request_id="r1")
    server.answers["Generate"] = lambda request, context: server.hold(context, first)
    return server


@pytest.fixture
def silent(server: Any) -> Any:
    """The server never sends anything."""

    server.answers["Generate"] = lambda request, context: server.hold(context)
    return server


class TestDeadline:
    def test_of_the_call(self, drive: Any, silent: Any, client: Any) -> None:
        for act in (
            lambda: client.generate("x", timeout=0.2),
            lambda: client.stream("x", timeout=0.2).collect(),
        ):
            with pytest.raises(DeadlineExceededError):
                drive(act)

    def test_of_the_client(self, drive: Any, silent: Any, connect: Any) -> None:
        client = connect(timeout=0.2)
        with pytest.raises(DeadlineExceededError):
            drive(lambda: client.generate("x"))

    def test_in_the_middle_of_a_stream(self, drive: Any, endless: Any, client: Any) -> None:
        stream = drive(lambda: client.stream("x", timeout=0.3))
        assert drive.next(stream).text == "first"
        with pytest.raises(DeadlineExceededError) as caught:
            drive.next(stream)
        assert caught.value.request_id == "r1"
        assert endless.cancelled.wait(SAFETY_S)

    @pytest.mark.parametrize(
        ("of_client", "of_call", "limited"),
        [(None, None, False), (50, None, True), (None, 50, True), (50, float("inf"), False)],
    )
    def test_reaches_the_server(
        self, drive: Any, server: Any, connect: Any, of_client: Any, of_call: Any, limited: bool
    ) -> None:
        left: list[float | None] = []

        def answer(request: Any, context: Any) -> Any:
            left.append(context.time_remaining())
            return model_pb2.GetModelResponse()

        server.answers["GetModel"] = answer
        client = connect(timeout=of_client)
        drive(lambda: client.model(timeout=of_call))
        # Without a deadline gRPC answers None or, in some releases, a number of centuries.
        assert (left[0] is not None and left[0] < 60) is limited


class TestCancel:
    def test_by_close(self, drive: Any, endless: Any, client: Any) -> None:
        stream = drive(lambda: client.stream("x"))
        assert drive.next(stream).text == "first"
        drive(stream.close)
        assert endless.cancelled.wait(SAFETY_S)
        with pytest.raises(RequestCancelledError) as caught:
            drive.next(stream)
        assert caught.value.request_id == "r1"

    def test_by_leaving_the_context(self, drive: Any, endless: Any, client: Any) -> None:
        async def leave_async() -> None:
            async with client.stream("x") as stream:
                async for chunk in stream:
                    assert chunk.text == "first"
                    break

        def leave() -> None:
            with client.stream("x") as stream:
                for chunk in stream:
                    assert chunk.text == "first"
                    break

        drive(leave_async if isinstance(client, AsyncClient) else leave)
        drive(lambda: None)
        assert endless.cancelled.wait(SAFETY_S)

    @pytest.mark.parametrize("chunks", [0, 1])
    def test_by_letting_go(self, drive: Any, server: Any, client: Any, chunks: int) -> None:
        arrived = threading.Event()

        def answer(request: Any, context: Any) -> Iterator[Any]:
            arrived.set()
            return server.hold(context, *[generation_pb2.GenerateResponse(text="first")] * chunks)

        server.answers["Generate"] = answer
        stream = drive(lambda: client.stream("x"))
        for _ in range(chunks):
            drive.next(stream)
        while not arrived.wait(0.01):  # the request leaves while the loop runs
            drive(lambda: asyncio.sleep(0.01) if isinstance(client, AsyncClient) else None)
        del stream
        gc.collect()
        drive(lambda: asyncio.sleep(0.01) if isinstance(client, AsyncClient) else None)
        assert server.cancelled.wait(SAFETY_S)

    def test_a_finished_stream_may_be_closed(self, drive: Any, client: Any) -> None:
        stream = drive(lambda: client.stream("x"))
        answer = drive(stream.collect)
        drive(stream.close)
        assert answer.text == "Grüße"

    def test_by_another_thread(self, endless: Any) -> None:
        with Client(endless.address) as client, client.stream("x") as stream:
            assert next(stream).text == "first"
            threading.Timer(0.1, stream.close).start()
            with pytest.raises(RequestCancelledError):
                next(stream)

    def test_by_closing_the_client(self, endless: Any) -> None:
        client = Client(endless.address)
        stream = client.stream("x")
        assert next(stream).text == "first"
        threading.Timer(0.1, client.close).start()
        with pytest.raises(RequestCancelledError):
            next(stream)
        assert endless.cancelled.wait(SAFETY_S)

    def test_by_closing_the_client_beside_a_task(self, endless: Any) -> None:
        async def run() -> None:
            client = AsyncClient(endless.address)
            stream = client.stream("x")
            assert (await anext(stream)).text == "first"
            unary = asyncio.create_task(client.generate("x"))
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.1)
            await client.close()
            outcomes = await asyncio.gather(unary, reading, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [RequestCancelledError] * 2

        asyncio.run(run())

    def test_of_the_task_stays_what_it_is(self, silent: Any) -> None:
        async def run() -> None:
            async with AsyncClient(silent.address) as client:
                unary = asyncio.create_task(client.generate("x"))
                reading = asyncio.create_task(anext(client.stream("x")))
                await asyncio.sleep(0.1)
                for task in (unary, reading):
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await client.generate("x")

        asyncio.run(run())
        assert silent.cancelled.wait(SAFETY_S)


class TestRetries:
    @staticmethod
    def failing(
        server: Any, abort: Any, times: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    ) -> None:
        good = server.answers["Generate"]
        left = [times]

        def answer(request: Any, context: Any) -> Iterator[Any]:
            left[0] -= 1
            if left[0] >= 0:
                abort(context, code, "not now")
            yield from good(request, context)

        server.answers["Generate"] = answer

    def test_until_the_server_is_there(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=QUICK)
        self.failing(server, abort, times=3)
        assert drive(lambda: client.generate("x")).text == "Grüße"
        assert server.calls["GenerateUnary"] == 4

    def test_a_stream_that_sent_nothing(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=QUICK)
        self.failing(server, abort, times=2)
        assert drive(lambda: client.stream("x").collect()).text == "Grüße"
        assert server.calls["Generate"] == 3

    def test_never_a_stream_that_has_begun(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        def answer(request: Any, context: Any) -> Iterator[Any]:
            yield generation_pb2.GenerateResponse(text="first")
            abort(context, grpc.StatusCode.UNAVAILABLE, "gone")

        server.answers["Generate"] = answer
        client = connect(retry=QUICK)
        with pytest.raises(UnavailableError):
            drive(lambda: client.stream("x").collect())
        assert server.calls["Generate"] == 1

    def test_end(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=RetryPolicy(max_attempts=2, initial_backoff_s=0.01))
        self.failing(server, abort, times=9)
        with pytest.raises(UnavailableError, match="not now"):
            drive(lambda: client.generate("x"))
        assert server.calls["GenerateUnary"] == 2

    def test_can_be_switched_off(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=None)
        self.failing(server, abort, times=1)
        with pytest.raises(UnavailableError):
            drive(lambda: client.generate("x"))
        assert server.calls["GenerateUnary"] == 1

    def test_a_full_queue_is_not_pressed(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=QUICK)
        self.failing(server, abort, times=1, code=grpc.StatusCode.RESOURCE_EXHAUSTED)
        with pytest.raises(ResourceExhaustedError):
            drive(lambda: client.generate("x"))
        assert server.calls["GenerateUnary"] == 1

    def test_a_full_queue_on_demand(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=dataclasses.replace(QUICK, when_full=True))
        self.failing(server, abort, times=2, code=grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert drive(lambda: client.generate("x")).text == "Grüße"
        assert server.calls["GenerateUnary"] == 3

    @pytest.mark.parametrize(("pushback", "attempts"), [("1", 3), ("-1", 1)])
    def test_the_server_says_when_or_never(
        self, drive: Any, server: Any, abort: Any, connect: Any, pushback: str, attempts: int
    ) -> None:
        """Without its word the client would wait for hours."""

        def answer(request: Any, context: Any) -> Iterator[Any]:
            if server.calls["GenerateUnary"] < 3:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
                context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            yield from good(request, context)

        good, server.answers["Generate"] = server.answers["Generate"], answer
        client = connect(retry=RetryPolicy(initial_backoff_s=9999, max_backoff_s=9999))
        if attempts == 3:
            assert drive(lambda: client.generate("x")).text == "Grüße"
        else:
            with pytest.raises(UnavailableError):
                drive(lambda: client.generate("x"))
        assert server.calls["GenerateUnary"] == attempts

    def test_within_a_budget(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        client = connect(retry=dataclasses.replace(QUICK, budget=4))
        self.failing(server, abort, times=99)
        for _ in range(3):
            with pytest.raises(UnavailableError):
                drive(lambda: client.generate("x"))
        assert server.calls["GenerateUnary"] == 2 + 1 + 1

    def test_loading_and_unloading_are_not_repeated(
        self, drive: Any, server: Any, abort: Any, connect: Any
    ) -> None:
        client = connect(retry=QUICK)
        for method in ("LoadAdapter", "UnloadAdapter"):
            server.answers[method] = lambda request, context: abort(
                context, grpc.StatusCode.UNAVAILABLE, "not now"
            )
        with pytest.raises(UnavailableError):
            drive(lambda: client.adapters.load("a", "/a"))
        with pytest.raises(UnavailableError):
            drive(lambda: client.adapters.unload("a"))
        assert server.calls == {"LoadAdapter": 1, "UnloadAdapter": 1}

    def test_name_every_other_method_of_the_contract(self) -> None:
        contract = {
            f"{service.full_name}/{method.name}"
            for file in (adapters_pb2, generation_pb2, model_pb2)
            for service in file.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        }
        named = {f"{service}/{method}" for service, methods in REPEATABLE.items() for method in methods}
        assert contract - named == {
            "loraplex.v1.AdapterService/LoadAdapter",
            "loraplex.v1.AdapterService/RegisterComposition",
            "loraplex.v1.AdapterService/UnloadAdapter",
            "loraplex.v1.AdapterService/UploadAdapter",
        }
        assert named <= contract

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_attempts": 1},
            {"max_attempts": 6},
            {"multiplier": 0},
            {"max_backoff_s": float("inf")},
            {"budget": 0},
            {"budget": 1001},
        ],
    )
    def test_policies_are_checked(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
            RetryPolicy(**wrong)


class TestWaitUntilReady:
    def test_for_a_server_that_is_not_there_yet(
        self, drive: Any, connect: Any, new_server: Any, tmp_path: Any
    ) -> None:
        late = new_server()
        late.answers["GetModel"] = lambda request, context: model_pb2.GetModelResponse(
            model=model_pb2.Model(name="late")
        )
        address = f"unix:{tmp_path}/late.sock"
        client = connect(address)
        starter = threading.Timer(0.5, late.start, [address])
        starter.start()
        assert drive(lambda: client.wait_until_ready(SAFETY_S)).name == "late"
        starter.join()

    def test_for_a_server_that_is_loading(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        def answer(request: Any, context: Any) -> Any:
            if server.calls["GetModel"] < 4:
                abort(context, grpc.StatusCode.UNAVAILABLE, "loading")
            return model_pb2.GetModelResponse(model=model_pb2.Model(name="loaded"))

        server.answers["GetModel"] = answer
        client = connect(retry=None)
        assert drive(lambda: client.wait_until_ready(SAFETY_S)).name == "loaded"
        assert server.calls["GetModel"] == 4

    def test_in_vain(self, drive: Any, connect: Any, tmp_path: Any) -> None:
        client = connect(f"unix:{tmp_path}/never.sock")
        with pytest.raises(DeadlineExceededError, match=r"never\.sock within 0\.3 s"):
            drive(lambda: client.wait_until_ready(0.3))

    def test_while_it_only_loads(self, drive: Any, server: Any, abort: Any, connect: Any) -> None:
        server.answers["GetModel"] = lambda request, context: abort(
            context, grpc.StatusCode.UNAVAILABLE, "loading"
        )
        client = connect(retry=None)
        with pytest.raises(DeadlineExceededError, match="no server was ready"):
            drive(lambda: client.wait_until_ready(0.3))


class TestClosed:
    def test_clients_say_so(self, drive: Any, connect: Any) -> None:
        client = connect()
        drive(client.close)
        drive(client.close)
        for act in (
            lambda: client.generate("x"),
            lambda: client.stream("x"),
            lambda: client.model(),
            lambda: client.adapters.list(),
        ):
            with pytest.raises(RuntimeError, match="is closed"):
                drive(act)

    def test_by_their_context(self, server: Any) -> None:
        with Client(server.address) as client:
            assert client.generate("x").text == "Grüße"
        with pytest.raises(RuntimeError, match="is closed"):
            client.generate("x")

    def test_by_their_async_context(self, server: Any) -> None:
        client = AsyncClient(server.address)  # no loop runs yet

        async def run() -> None:
            async with client:
                answers = await asyncio.gather(*(client.generate("x") for _ in range(50)))
                assert {answer.text for answer in answers} == {"Grüße"}
            with pytest.raises(RuntimeError, match="is closed"):
                await client.generate("x")

        asyncio.run(run())


def test_one_client_serves_many_threads(server: Any) -> None:
    texts: list[str] = []
    with Client(server.address) as client:
        threads = [
            threading.Thread(target=lambda: texts.append(client.stream("x").collect().text))
            for _ in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == ["Grüße"] * 20


def test_the_service_config_is_grpc_s_json() -> None:
    from loraplex._channel import service_config

    config = json.loads(service_config(RetryPolicy()))
    assert config["retryThrottling"] == {"maxTokens": 100, "tokenRatio": 0.2}
    (method,) = config["methodConfig"]
    assert method["retryPolicy"] == {
        "maxAttempts": 4,
        "initialBackoff": "0.100000000s",
        "maxBackoff": "2.000000000s",
        "backoffMultiplier": 2.0,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
