"""The engine in its own process, over its socket: streaming, cancelling, crashes on either side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.config import AdapterConfig, EngineConfig, ModelConfig
from loraplex_server.core.errors import FailedPreconditionError, NotFoundError, UnavailableError
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.process import EngineProcess, launch_engine
from loraplex_server.wire.client import EngineClient
from loraplex_server.wire.commands import (
    CheckIntegrity,
    GetAdapter,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)
from loraplex_server.wire.frames import encode
from loraplex_server.wire.messages import PROTOCOL_VERSION, Hello

PROMPT = (5, 17, 60, 121, 9)


def config(tiny_model: Any) -> EngineConfig:
    return EngineConfig(
        ModelConfig(str(tiny_model.base), dtype="float32", threads=1),
        adapters=AdapterConfig(folders=(tiny_model.adapters,), device_bytes=1 << 20, max_on_device=3),
    )


@pytest.fixture(scope="module")
def engine(tiny: Any) -> Iterator[EngineProcess]:
    process = launch_engine(config(tiny("Llama")), progress=False)
    process.wait_ready()
    yield process
    process.terminate()
    assert process.exit_code == 0
    assert not Path(process.socket_path).exists()


def request(name: str, adapters: tuple[str, ...] = (), **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **sampling})
    return Request(name, PROMPT, params, tuple(AdapterUse(adapter) for adapter in adapters))


@contextlib.asynccontextmanager
async def connected(engine: EngineProcess) -> AsyncIterator[EngineClient]:
    client = await EngineClient.connect(engine.socket_path, engine.token)
    try:
        yield client
    finally:
        await client.close()


async def collect(client: EngineClient, asked: Request) -> list[int]:
    tokens: list[int] = []
    async for delta in client.stream(asked):
        tokens += delta.token_ids
    return tokens


async def settled(client: EngineClient) -> None:
    """Waits until the engine holds nothing; fails if it does not let go."""
    for _ in range(100):
        reply = await client.command(CheckIntegrity())
        assert reply.problems == ()
        if (reply.running, reply.waiting, reply.kv_blocks_used, reply.adapter_references) == (0, 0, 0, 0):
            assert reply.weight_checksum == client.info.weight_checksum
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"still held: {reply}")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_answers_are_those_of_the_oracle(
    engine: EngineProcess, oracle: Any, adapter_names: list[str]
) -> None:
    async def test() -> None:
        async with connected(engine) as client:
            names = [(), *((name,) for name in adapter_names)]
            answers = await asyncio.gather(
                *(collect(client, request(f"q{index}", adapters)) for index, adapters in enumerate(names))
            )
            for adapters, tokens in zip(names, answers, strict=True):
                truth = oracle("Llama", "nf4").generate(PROMPT, [(name, 1.0) for name in adapters], 6)[0]
                assert tokens == truth
            await settled(client)

    run(test)


def test_leaving_a_stream_cancels_the_request(engine: EngineProcess) -> None:
    async def test() -> None:
        async with connected(engine) as client:
            stream = client.stream(request("left", ("r6",), max_tokens=100))
            async for _ in stream:
                break
            await stream.aclose()
            await settled(client)

    run(test)


def test_a_client_that_dies_leaves_nothing_behind(engine: EngineProcess) -> None:
    async def test() -> None:
        async with connected(engine) as client:
            dying = await EngineClient.connect(engine.socket_path, engine.token)
            streams = [dying.stream(request(f"d{index}", ("r8",), max_tokens=100)) for index in range(3)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            # As the kernel would: the connection is gone, no goodbye.
            dying._writer.transport.abort()
            await settled(client)
            for stream in streams:
                await stream.aclose()
            await dying.close()

    run(test)


def test_errors_and_adapter_operations_come_back_typed(engine: EngineProcess, tiny: Any) -> None:
    async def test() -> None:
        async with connected(engine) as client:
            with pytest.raises(NotFoundError) as caught:
                await collect(client, request("nobody", ("nobody",)))
            assert caught.value.info.resource == ("adapter", "nobody")
            source = str(tiny("Llama").adapters / "r6")
            loaded = await client.command(LoadAdapter("again", source))
            assert (loaded.state, loaded.rank) == ("host", 6)
            pinned = await client.command(PinAdapter("again", True))
            assert (pinned.state, pinned.pinned) == ("device", True)
            assert (await client.command(GetAdapter("again"))).content_hash == pinned.content_hash != ""
            assert await collect(client, request("x", ("again",))) == await collect(
                client, request("y", ("r6",))
            )
            remaining = await client.command(UnloadAdapter("again"))
            assert "again" not in [status.name for status in remaining]
            with pytest.raises(NotFoundError):
                await client.command(GetAdapter("again"))
            await settled(client)

    run(test)


def test_two_clients_may_use_the_same_request_id(engine: EngineProcess) -> None:
    async def test() -> None:
        async with connected(engine) as one, connected(engine) as other:
            answers = await asyncio.gather(
                collect(one, request("same", ("r6",))), collect(other, request("same", ("r32",)))
            )
            assert answers[0] != answers[1]
            await settled(one)

    run(test)


@pytest.mark.parametrize(
    "frame",
    [
        encode(Hello(PROTOCOL_VERSION, "intruder", "wrong token")),
        encode(Hello(PROTOCOL_VERSION + 1, "stranger", "")),
        b"\x00\x00\x00\x04rubbish",
        b"\xff\xff\xff\xff",
    ],
)
def test_strangers_are_turned_away(engine: EngineProcess, frame: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(engine.socket_path)
        stranger.sendall(frame)
        assert stranger.recv(1) == b""
    assert engine.alive
    assert os.stat(engine.socket_path).st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_said_at_start(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny("Llama").base / "config.json").read_bytes())
    process = launch_engine(EngineConfig(ModelConfig(str(tmp_path))), progress=False)
    with pytest.raises(FailedPreconditionError, match="safetensors"):
        process.wait_ready()
    assert not process.alive


@pytest.mark.slow
def test_the_death_of_the_engine_reaches_every_stream(tiny: Any) -> None:
    process = launch_engine(config(tiny("Llama")), progress=False)
    process.wait_ready()

    async def test() -> None:
        async with connected(process) as client:
            stream = client.stream(request("q", max_tokens=100))
            await anext(stream)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(UnavailableError, match="engine has stopped"):
                async for _ in stream:
                    pass
            await client.wait_closed()
            assert not client.alive
            with pytest.raises(UnavailableError):
                await collect(client, request("late"))

    run(test)
    process.terminate()


_PARENT = """
import sys
from pathlib import Path
from loraplex_server.config import EngineConfig, ModelConfig
from loraplex_server.engine.process import launch_engine
if __name__ == "__main__":
    process = launch_engine(EngineConfig(ModelConfig(sys.argv[1], threads=1)), progress=False)
    process.wait_ready()
    print(process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_engine_ends_when_its_parent_is_killed(tiny: Any, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(tiny("Llama").base)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    end_s = time.monotonic() + 15
    while _runs(pid):
        assert time.monotonic() < end_s, "the engine outlived its parent"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """True if a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
