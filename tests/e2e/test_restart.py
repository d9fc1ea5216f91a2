"""The engine process is killed under a real server: it comes back, and with it every adapter."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import Client, errors
from loraplex.cli.exposition import scrape
from loraplex_bench.demo.tasks import data_dir, expected, make_lines, prompt
from loraplex_bench.load.launcher import LaunchedServer, demo_flags

LINES = make_lines(5, 8)


def engine_of(server: LaunchedServer) -> int:
    """The process that holds the model: the largest but the first."""
    sizes = {}
    for pid in server.pids():
        if pid != server.pid:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            sizes[pages] = pid
    return sizes[max(sizes)]


def test_a_killed_engine_comes_back_with_its_adapters() -> None:
    flags = [*demo_flags(), "--threads", "1", "--adapter-root", str(data_dir())]
    with LaunchedServer(flags) as server, Client(server.grpc) as client:
        client.adapters.load("mine", str(data_dir() / "adapters" / "upper"))
        client.adapters.unload("rot13")
        client.adapters.pin("reverse" if "reverse" in names(client) else "mine")
        before = names(client)
        held = {adapter.name for adapter in client.adapters.list() if adapter.pinned}

        failures: list[errors.LoraplexError] = []
        started = threading.Event()

        def ask() -> None:
            try:
                with Client(server.grpc, retry=None) as other:
                    for _ in other.stream(LINES[0], max_tokens=400, ignore_eos=True):
                        started.set()
            except errors.LoraplexError as error:
                failures.append(error)

        caller = threading.Thread(target=ask)
        caller.start()
        assert started.wait(30)
        seen = {health(server.grpc)}
        os.kill(engine_of(server), signal.SIGKILL)
        caller.join(30)
        assert not caller.is_alive(), "the call hangs"
        assert [type(error) for error in failures] == [errors.UnavailableError]
        end_s = time.monotonic() + 120
        while health(server.grpc) != health_pb2.HealthCheckResponse.SERVING or len(seen) < 2:
            seen.add(health(server.grpc))
            assert time.monotonic() < end_s
            time.sleep(0.02)
        assert names(client) == before
        assert "rot13" not in before
        end_s = time.monotonic() + 30
        while {adapter.name for adapter in client.adapters.list() if adapter.pinned} != held:
            assert time.monotonic() < end_s
            time.sleep(0.1)
        for line in LINES:
            answer = client.generate(prompt(line), adapter="mine", max_tokens=40)
            assert answer.text == expected("upper", line)
        assert server.metrics is not None
        assert scrape(server.metrics).value("loraplex_engine_restarts_total") == 1


def names(client: Client) -> list[str]:
    return sorted(adapter.name for adapter in client.adapters.list())


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status)


def test_an_engine_that_dies_too_often_ends_the_server() -> None:
    with LaunchedServer([*demo_flags(), "--threads", "1", "--max-engine-restarts", "0"]) as server:
        os.kill(engine_of(server), signal.SIGKILL)
        end_s = time.monotonic() + 30
        while server.running:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        assert server.stop() == 1
