"""The server's life: starting, ready, draining, losing its engine; health, reflection and metrics."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraplex.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, model_pb2, model_pb2_grpc
from loraplex_server.api.app import served_name
from loraplex_server.config import EngineConfig
from loraplex_server.core.adapter_status import AdapterChanges, AdapterStatus, SwapRecord
from loraplex_server.core.errors import ErrorInfo, FailedPreconditionError
from loraplex_server.core.request import FinishReason, Request
from loraplex_server.wire.commands import (
    Answer,
    AnyCommand,
    GetAdapter,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapters,
    UnloadAdapter,
)
from loraplex_server.wire.messages import Times
from loraplex_server.wire.stats import Stats, StepRecord

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("GenerationService", "AdapterService", "ModelService")
TIMES = Times(queue_s=0.01, adapter_wait_s=0.005, first_token_s=0.02, total_s=0.03, preemptions=0)
# Commands that are answered with several adapters.
LISTED = (ListAdapters, PrefetchAdapters, UnloadAdapter)

SQL = AdapterStatus(
    name="sql",
    source="/adapters/sql",
    state="device",
    pinned=True,
    peft_type="LORA",
    rank=6,
    target_modules=("q_proj", "v_proj"),
    bytes=12345,
    content_hash="ff00",
    references=2,
    draining=False,
    hits=10,
    misses=3,
    evictions=1,
)


async def health_of(stub: Any, service: str = "") -> int:
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def generate(**fields: Any) -> generation_pb2.GenerateUnaryRequest:
    return generation_pb2.GenerateUnaryRequest(request=generation_pb2.GenerateRequest(text="hello", **fields))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_health_and_model_of_a_ready_server(serving: Any, engine_info: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            for service in ("", *(f"loraplex.v1.{name}" for name in SERVICES)):
                assert await health_of(server.health, service) == SERVING
            assert await code_of(server.health.Check(health_pb2.HealthCheckRequest(service="no"))) == (
                grpc.StatusCode.NOT_FOUND
            )
            model = (await server.model.GetModel(model_pb2.GetModelRequest())).model
            assert (model.name, model.architecture) == ("tiny", "LlamaForCausalLM")
            for field in ("vocab_size", "max_model_len", "weight_bytes", "weight_checksum", "kv_blocks"):
                assert getattr(model, field) == getattr(engine_info, field)
            assert model.server_version

    asyncio.run(main())


def test_reflection_names_every_service(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            names = {s.name async for answer in call for s in answer.list_services_response.service}
            assert names == {
                *(f"loraplex.v1.{name}" for name in SERVICES),
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }

    asyncio.run(main())


def test_adapter_operations(serving: Any) -> None:
    commands: list[AnyCommand] = []

    def reply(command: AnyCommand) -> Answer | ErrorInfo:
        commands.append(command)
        if command == GetAdapter("gone"):
            return ErrorInfo("NOT_FOUND", "no adapter gone", resource=("adapter", "gone"))
        return (SQL,) if isinstance(command, LISTED) else SQL

    async def main() -> None:
        async with serving() as server:
            server.engine.adapters = reply
            stub = server.adapters
            loaded = (
                await stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="sql", source="/a"))
            ).adapter
            assert loaded.state == adapters_pb2.ADAPTER_STATE_DEVICE
            for field in ("name", "source", "pinned", "peft_type", "rank", "bytes", "content_hash"):
                assert getattr(loaded, field) == getattr(SQL, field)
            for field in ("references", "draining", "hits", "misses", "evictions"):
                assert getattr(loaded, field) == getattr(SQL, field)
            assert tuple(loaded.target_modules) == SQL.target_modules
            assert (await stub.GetAdapter(adapters_pb2.GetAdapterRequest(name="sql"))).adapter == loaded
            assert list((await stub.ListAdapters(adapters_pb2.ListAdaptersRequest())).adapters) == [loaded]
            await stub.PinAdapter(adapters_pb2.PinAdapterRequest(name="sql"))
            await stub.PinAdapter(adapters_pb2.PinAdapterRequest(name="sql", pinned=False))
            left = await stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="sql"))
            assert list(left.remaining) == [loaded]
            assert commands == [
                LoadAdapter("sql", "/a", inplace=False),
                GetAdapter("sql"),
                ListAdapters(),
                PinAdapter("sql", True),
                PinAdapter("sql", False),
                UnloadAdapter("sql", grace_s=None),
            ]
            await stub.LoadAdapter(
                adapters_pb2.LoadAdapterRequest(name="sql", source="/b", load_inplace=True)
            )
            await stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="sql", grace_seconds=2.5))
            hinted = await stub.Prefetch(adapters_pb2.PrefetchRequest(names=["sql", "b"], host_only=True))
            assert list(hinted.adapters) == [loaded]
            assert commands[-3:] == [
                LoadAdapter("sql", "/b", inplace=True),
                UnloadAdapter("sql", grace_s=2.5),
                PrefetchAdapters(("sql", "b"), to_device=False),
            ]
            for bad in (
                stub.GetAdapter(adapters_pb2.GetAdapterRequest(name="../etc")),
                stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="sql")),
                stub.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="a" * 129, source="/a")),
                stub.PinAdapter(adapters_pb2.PinAdapterRequest()),
                stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="sql", grace_seconds=-1)),
                stub.Prefetch(adapters_pb2.PrefetchRequest()),
                stub.Prefetch(adapters_pb2.PrefetchRequest(names=["sql", "../etc"])),
            ):
                assert await code_of(bad) == grpc.StatusCode.INVALID_ARGUMENT
            gone = stub.GetAdapter(adapters_pb2.GetAdapterRequest(name="gone"))
            assert await code_of(gone) == grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_watching_adapters(serving: Any) -> None:
    other = msgspec.structs.replace(SQL, name="other")
    sent = adapters_pb2.WatchResponse

    async def main() -> None:
        async with serving() as server:
            server.engine.watched = AdapterChanges((SQL, other), all=True)
            everything = server.adapters.Watch(adapters_pb2.WatchRequest())
            assert [adapter.name for adapter in (await everything.read()).adapters] == ["sql", "other"]
            one = server.adapters.Watch(adapters_pb2.WatchRequest(names=["sql"]))
            assert [adapter.name for adapter in (await one.read()).adapters] == ["sql"]
            assert len((await everything.read()).adapters) == 2, "the list that the second one asked for"

            server.engine.send(AdapterChanges((other,)))
            assert [adapter.name for adapter in (await everything.read()).adapters] == ["other"]
            server.engine.send(AdapterChanges((msgspec.structs.replace(SQL, state="host"),), ("other",)))
            changed = await everything.read()
            assert (changed.adapters[0].state, list(changed.removed)) == (
                adapters_pb2.ADAPTER_STATE_HOST,
                ["other"],
            )
            ours = await one.read()
            assert ours == sent(adapters=changed.adapters), "of the other it was told nothing"

            one.cancel()
            bad = server.adapters.Watch(adapters_pb2.WatchRequest(names=["../etc"]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bad.read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert not server.engine.unwatched, "one still watches"
            everything.cancel()
            while not server.engine.unwatched:
                await asyncio.sleep(0.01)

            last = server.adapters.Watch(adapters_pb2.WatchRequest())
            await last.read()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await last.code() == grpc.StatusCode.UNAVAILABLE, "a watch holds up no shutdown"
            assert await server.task == 0

    asyncio.run(main())


def test_not_serving_until_the_engine_is_ready(new_engine: Any, start_server: Any) -> None:
    port = free_port()

    async def main() -> None:
        async with new_engine() as engine, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            engine.may_be_ready.clear()
            task, ready = start_server(engine, port=port)
            await channel.channel_ready()
            health = health_pb2_grpc.HealthStub(channel)
            assert await health_of(health) == NOT_SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(service="loraplex.v1.GenerationService"))
            assert (await watch.read()).status == NOT_SERVING
            model = model_pb2_grpc.ModelServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await model.GetModel(model_pb2.GetModelRequest())
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert any(key == "grpc-status-details-bin" for key, _ in caught.value.trailing_metadata())
            engine.may_be_ready.set()
            assert (await ready())[1] == f"127.0.0.1:{port}"
            assert (await watch.read()).status == SERVING
            assert await health_of(health) == SERVING
            await model.GetModel(model_pb2.GetModelRequest())
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING
            assert await task == 0

    asyncio.run(main())


def test_a_signal_while_starting_ends_the_engine(new_engine: Any, start_server: Any) -> None:
    async def main() -> None:
        async with new_engine() as engine:
            engine.may_be_ready.clear()
            before = signal.getsignal(signal.SIGINT)
            task, _ = start_server(engine)
            while signal.getsignal(signal.SIGINT) is before:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            assert await asyncio.wait_for(task, 10) == 0
            assert engine.terminated

    asyncio.run(main())


def test_an_engine_that_cannot_start_ends_the_server(
    new_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with new_engine() as engine:
            engine.start_error = FailedPreconditionError("this architecture cannot be served")
            task, _ = start_server(engine)
            assert await asyncio.wait_for(task, 10) == 1

    asyncio.run(main())
    assert "this architecture cannot be served" in caplog.text


@pytest.mark.parametrize("which", ["port", "metrics_port"])
def test_a_taken_port_is_found_before_the_engine_is_launched(
    new_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            async with new_engine() as engine:
                task, _ = start_server(engine, **{which: taken.getsockname()[1]})
                assert await asyncio.wait_for(task, 10) == 1
                assert not engine.launched

    asyncio.run(main())
    assert f"--{which.replace('_', '-')}" in caplog.text


def test_sigterm_lets_running_calls_end_and_refuses_new_ones(serving: Any) -> None:
    async def script(engine: Any, core: Request) -> None:
        engine.tokens(core, 40)
        await release.wait()
        engine.tokens(core, 41, finish=FinishReason.LENGTH, times=TIMES)

    async def main() -> None:
        nonlocal release
        release = asyncio.Event()
        async with serving(script) as server:
            watch = server.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            running = server.generation.Generate(generate().request)
            assert (await running.read()).token_ids == [40]
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING
            assert await code_of(server.generation.GenerateUnary(generate())) == grpc.StatusCode.UNAVAILABLE
            assert not server.task.done()
            release.set()
            assert (await running.read()).HasField("finish")
            assert await running.code() == grpc.StatusCode.OK
            assert await asyncio.wait_for(server.task, 10) == 0
            assert server.engine.got_shutdown
            assert not server.engine.cancelled

    release: asyncio.Event
    asyncio.run(main())


@pytest.mark.parametrize("how", ["drain time is over", "second signal"])
def test_calls_that_do_not_end_are_cut_off(serving: Any, how: str) -> None:
    drain_s = 0.1 if how == "drain time is over" else 1000.0

    async def main() -> None:
        async with serving(drain_s=drain_s) as server:
            call = asyncio.create_task(code_of(server.generation.GenerateUnary(generate())))
            await server.engine.until(lambda: len(server.engine.submitted) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            if how == "second signal":
                while await health_of(server.health) != NOT_SERVING:
                    await asyncio.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(call, 10) == grpc.StatusCode.UNAVAILABLE
            assert await asyncio.wait_for(server.task, 10) == 0
            assert server.engine.got_shutdown

    asyncio.run(main())


def test_the_engines_death_ends_calls_and_server(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(max_engine_restarts=0) as server:
            watch = server.health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            call = asyncio.create_task(code_of(server.generation.GenerateUnary(generate())))
            await server.engine.until(lambda: len(server.engine.submitted) == 1)
            server.engine.die()
            server.engine.ended.set()
            assert (await watch.read()).status == NOT_SERVING
            assert await asyncio.wait_for(call, 10) == grpc.StatusCode.UNAVAILABLE
            assert await asyncio.wait_for(server.task, 10) == 1

    asyncio.run(main())
    assert "the engine has died" in caplog.text


def test_an_engine_that_died_is_started_again(
    new_engine: Any, start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls fail meanwhile, health says so, and the new engine is told what the old one had been."""
    told: list[AnyCommand] = []

    def keep(command: AnyCommand) -> Answer:
        told.append(command)
        return (SQL,) if isinstance(command, LISTED) else SQL

    async def main() -> None:
        first, second = new_engine(), new_engine()
        first.adapters = second.adapters = keep
        engines = [first]
        # The new process is not there before the test says so.
        second.may_be_ready.clear()

        def launch(config: EngineConfig) -> Any:
            return engines[-1].launch(config)

        async with first:
            task, ready = start_server(first, launch=launch)
            match = await ready()
            channel = grpc.aio.insecure_channel(match[1])
            adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            for name in ("sql", "gone", "early"):
                await adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name, source=f"/{name}"))
            await adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="gone"))
            newer = adapters_pb2.LoadAdapterRequest(name="sql", source="/newer", load_inplace=True)
            await adapters.LoadAdapter(newer)
            await adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="sql"))
            told.clear()
            engines.append(second)
            first.ended.set()
        assert (await watch.read()).status == NOT_SERVING
        refused = await code_of(adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()))
        assert refused == grpc.StatusCode.UNAVAILABLE
        async with second:
            second.may_be_ready.set()
            assert (await asyncio.wait_for(watch.read(), 10)).status == SERVING
            assert told == [
                ListAdapters(),
                LoadAdapter("early", "/early", inplace=False),
                LoadAdapter("sql", "/newer", inplace=True),
                PinAdapter("sql"),
            ]
            await adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
            await channel.close()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(task, 10) == 0
            assert second.got_shutdown

    asyncio.run(main())
    assert "the engine has died; it is started again" in caplog.text


def test_metrics_of_engine_and_requests(serving: Any) -> None:
    async def script(engine: Any, core: Request) -> None:
        for token_id in (40, 41, 42):
            engine.tokens(core, token_id)
        engine.tokens(core, 43, finish=FinishReason.LENGTH, times=TIMES)

    stats = Stats(
        steps=(
            StepRecord(0.004, 0.001, 3, 20, 2, 2, 0),
            StepRecord(0.003, 0.001, 3, 0, 3, 2, 1, 0.002, 0.0005, 0.0003, 0.002, 0.0004, 0.0001),
        ),
        swaps=(
            SwapRecord("load", "sql", 0.02, 1000),
            SwapRecord("copy", "sql", 0.002, 1000),
            SwapRecord("evict_device", "old", 0.0, 900),
        ),
        waiting=5,
        running=3,
        waiting_for_adapter=2,
        kv_blocks_used=25,
        kv_blocks=100,
        adapter_device_bytes_used=1000,
        adapter_host_bytes_used=3000,
        adapters_on_device=("sql",),
        adapters_on_host=("sql", "old"),
        adapter_hits=7,
        adapter_misses=2,
        kv_blocks_cached=40,
        prefix_queries=90,
        prefix_hits=64,
    )

    async def main() -> None:
        async with serving(script, metrics_port=0) as server:
            server.engine.send(stats)
            server.engine.send(stats)
            uses = [generation_pb2.AdapterWeight(adapter="sql")]
            await server.generation.GenerateUnary(generate(adapters=uses))
            await server.generation.GenerateUnary(generate())
            assert await code_of(server.generation.GenerateUnary(generate(logprobs=99))) == (
                grpc.StatusCode.INVALID_ARGUMENT
            )
            found = await server.scrape()
            method = "method=/loraplex.v1.GenerationService/GenerateUnary"
            expected = {
                "loraplex_requests_waiting": 5,
                "loraplex_requests_running": 3,
                "loraplex_requests_waiting_for_adapter": 2,
                "loraplex_step_seconds_count": 4,
                "loraplex_step_requests_sum": 12,
                "loraplex_step_device_seconds_count": 2,
                "loraplex_step_device_idle_seconds_sum": 0.001,
                "loraplex_step_prepare_seconds_sum": 0.0006,
                "loraplex_step_run_seconds_sum": 0.004,
                "loraplex_step_sample_seconds_sum": 0.0008,
                "loraplex_step_emit_seconds_sum": 0.0002,
                "loraplex_prefill_tokens_total": 40,
                "loraplex_decode_tokens_total": 10,
                "loraplex_preemptions_total": 2,
                "loraplex_kv_cache_usage_ratio": 0.25,
                "loraplex_kv_cache_blocks_cached": 40,
                "loraplex_prefix_cache_queries_tokens_total": 180,
                "loraplex_prefix_cache_hits_tokens_total": 128,
                "loraplex_adapter_hits_total": 14,
                "loraplex_adapter_misses_total": 4,
                "loraplex_adapter_evictions_total{tier=device}": 2,
                "loraplex_adapter_swap_in_seconds_count{kind=load}": 2,
                "loraplex_adapter_swap_in_seconds_count{kind=copy}": 2,
                "loraplex_adapter_used_bytes{tier=host}": 3000,
                "loraplex_adapter_capacity_bytes{tier=device}": 1 << 20,
                "loraplex_adapters_resident{tier=host}": 2,
                "loraplex_requests_total{outcome=length}": 2,
                "loraplex_request_time_to_first_token_seconds_count": 2,
                "loraplex_request_time_per_output_token_seconds_count": 2,
                "loraplex_request_seconds_count": 2,
                "loraplex_completion_tokens_total{adapter=sql}": 4,
                "loraplex_completion_tokens_total{adapter=(base)}": 4,
                f"loraplex_grpc_calls_total{{code=OK,{method}}}": 2,
                f"loraplex_grpc_calls_total{{code=INVALID_ARGUMENT,{method}}}": 1,
                "loraplex_errors_total{reason=INVALID_ARGUMENT}": 1,
            }
            assert {name: found.get(name) for name in expected} == expected
            assert found["loraplex_request_adapter_wait_seconds_sum"] == pytest.approx(0.01)
            [build] = [name for name in found if name.startswith("loraplex_build_info")]
            assert "model=tiny" in build
            assert "quantization=nf4" in build

    asyncio.run(main())


def test_request_ids_come_back(serving: Any) -> None:
    async def main() -> None:
        async with serving() as server:
            call = server.model.GetModel(model_pb2.GetModelRequest(), metadata=(("x-request-id", "abc-1"),))
            await call
            assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1"
            spaced = server.model.GetModel(model_pb2.GetModelRequest(), metadata=(("x-request-id", "a b"),))
            await spaced
            assert dict(await spaced.trailing_metadata())["x-request-id"] not in ("", "a b")

    asyncio.run(main())


def test_a_model_is_named_as_its_operator_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snapshots/0a1b2c").mkdir(parents=True)
    (tmp_path / "llama").symlink_to(tmp_path / "snapshots/0a1b2c")
    monkeypatch.chdir(tmp_path)
    for model, name in (
        ("./llama", "llama"),
        ("llama/", "llama"),
        (str(tmp_path / "llama"), "llama"),
        ("./snapshots/../llama", "llama"),
        ("snapshots/0a1b2c", "0a1b2c"),
        (".", tmp_path.name),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ):
        assert served_name(model) == name, model
