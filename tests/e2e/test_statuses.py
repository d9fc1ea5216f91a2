"""Every status of the API over a real channel to a real server, each with its reason and its details.

One server from its start to its end: while it loads, while it serves, in `make faults` after a fault of its
device, while it drains under load.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status

from loraplex.cli.exposition import scrape
from loraplex.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from loraplex_bench.demo.tasks import data_dir, expected, prompt, sure_lines
from loraplex_bench.load.launcher import LaunchedServer, demo_flags

LINES = sure_lines()
LONG = os.environ.get("LORAPLEX_FAULTS") == "long"
LONG_S = 120.0
GENERATION, ADAPTERS = "/loraplex.v1.GenerationService/", "/loraplex.v1.AdapterService/"


@dataclass(frozen=True)
class Failure:
    """The status of a failed call, as the client sees it."""

    code: str
    message: str
    reason: str
    domain: str
    details: dict[str, Any]


def failure_of(error: grpc.RpcError) -> Failure:
    status = rpc_status.from_call(error)
    found: dict[str, Any] = {}
    for packed in status.details if status is not None else ():
        kind = getattr(details, packed.type_url.rpartition(".")[2])
        found[kind.__name__] = kind()
        assert packed.Unpack(found[kind.__name__])
    info = found.pop("ErrorInfo", details.ErrorInfo())
    if status is not None:
        told = dict(error.trailing_metadata())["x-request-id"]
        assert found.pop("RequestInfo").request_id == told != ""
    return Failure(error.code().name, error.details(), info.reason, info.domain, found)


class Caller:
    """Calls of all kinds, with the server's token."""

    def __init__(self, address: str, token: str) -> None:
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
        self.channel = grpc.insecure_channel(address, options)
        self.metadata = [("authorization", f"Bearer {token}")]
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)

    def fails(self, call: Any, *arguments: Any, **options: Any) -> Failure | None:
        """The failure of a call; None if it succeeds."""
        try:
            given = {"metadata": self.metadata, "timeout": LONG_S, **options}
            answer = call(*arguments, **given)
            if hasattr(answer, "__next__"):
                for _ in answer:
                    pass
        except grpc.RpcError as error:
            return failure_of(error)
        return None

    def generate(self, timeout: float = LONG_S, **fields: Any) -> Failure | None:
        request = generation_pb2.GenerateRequest(**{"text": prompt(LINES[0]), **fields})
        asked = generation_pb2.GenerateUnaryRequest(request=request)
        return self.fails(self.generation.GenerateUnary, asked, timeout=timeout)

    def answer(self, line: str, adapter: str | None) -> str:
        request = generation_pb2.GenerateRequest(text=prompt(line))
        if adapter is not None:
            request.adapters.add(adapter=adapter)
        request.stopping.max_tokens = 40
        asked = generation_pb2.GenerateUnaryRequest(request=request)
        return str(self.generation.GenerateUnary(asked, metadata=self.metadata, timeout=LONG_S).text)

    def stream(self, adapter: str | None = None, max_tokens: int = 400) -> Any:
        request = generation_pb2.GenerateRequest(text=prompt(LINES[0]))
        request.stopping.max_tokens, request.stopping.ignore_eos = max_tokens, True
        if adapter is not None:
            request.adapters.add(adapter=adapter)
        return self.generation.Generate(request, metadata=self.metadata, timeout=LONG_S)

    def load(self, name: str, source: str | Path) -> Failure | None:
        request = adapters_pb2.LoadAdapterRequest(name=name, source=str(source))
        return self.fails(self.adapters.LoadAdapter, request)

    def list(self) -> Failure | None:
        return self.fails(self.adapters.ListAdapters, adapters_pb2.ListAdaptersRequest(), timeout=5)

    def pin(self, name: str, pinned: bool = True) -> Failure | None:
        return self.fails(self.adapters.PinAdapter, adapters_pb2.PinAdapterRequest(name=name, pinned=pinned))


Until = Callable[[Callable[[], Any]], Any]


def queue_full(caller: Caller, until: Until) -> Failure:
    """One runs, two wait, the others are refused."""

    def some() -> Failure | None:
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: caller.fails(lambda **_: caller.stream()), range(6)))
        return next((failure for failure in found if failure is not None), None)

    failure: Failure = until(some)
    return failure


def uploads(caller: Caller, until: Until, code: str) -> Failure:
    """Of two clients that begin an upload and fall silent one is refused, the other told after a while."""

    def begin(name: str) -> Failure | None:
        over = threading.Event()

        def messages() -> Iterator[adapters_pb2.UploadAdapterRequest]:
            config = (data_dir() / "adapters" / "upper" / "adapter_config.json").read_text()
            header = adapters_pb2.UploadHeader(name=name, config=config, sha256="0" * 64, size=5)
            yield adapters_pb2.UploadAdapterRequest(header=header)
            over.wait(LONG_S)

        try:
            return caller.fails(caller.adapters.UploadAdapter, messages())
        finally:
            over.set()

    def some() -> Failure | None:
        with ThreadPoolExecutor(2) as pool:
            found = [failure for failure in pool.map(begin, ("one", "two")) if failure is not None]
        assert {failure.code for failure in found} <= {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}, found
        return next((failure for failure in found if failure.code == code), None)

    failure: Failure = until(some)
    return failure


def unloaded(caller: Caller, until: Until, root: Path) -> Failure:
    """A stream whose adapter is unloaded under it."""

    def some() -> Failure | None:
        assert caller.load("passing", root / "upper") is None
        stream = caller.stream("passing")
        next(stream)
        request = adapters_pb2.UnloadAdapterRequest(name="passing", grace_seconds=0)
        assert caller.fails(caller.adapters.UnloadAdapter, request) is None
        return caller.fails(lambda **_: stream)

    failure: Failure = until(some)
    return failure


def pinned_out(caller: Caller) -> Failure | None:
    assert caller.pin("upper") is None
    failure = caller.pin("rot13")
    assert caller.pin("upper", pinned=False) is None
    return failure


def held_up(caller: Caller, faults: Path) -> Failure | None:
    """A request whose step does not end before its deadline."""
    (faults / "hold").touch()
    try:
        return caller.generate(timeout=0.5)
    finally:
        (faults / "hold").unlink()


def one_runs_and_one_waits(
    caller: Caller, server: LaunchedServer, pool: ThreadPoolExecutor, until: Until
) -> list[Future[int]]:
    """Futures of two answers' token counts; empty if one ended before the other was seen waiting."""
    answers = [
        pool.submit(lambda parts: sum(len(part.token_ids) for part in parts), caller.stream())
        for _ in range(2)
    ]

    def seen() -> bool:
        assert server.metrics is not None
        return bool(scrape(server.metrics).value("loraplex_requests_waiting"))

    until(lambda: seen() or any(answer.done() for answer in answers))
    return [] if any(answer.done() for answer in answers) else answers


def raw(caller: Caller, path: str, body: bytes, **options: Any) -> Failure | None:
    return caller.fails(caller.channel.unary_unary(path), body, **options)


CHAT = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hello")])

Row = tuple[str, str, set[str], Callable[[], Failure | None]]


def statuses(caller: Caller, root: Path, poison: int, until: Until) -> list[Row]:
    """(status, reason, details beside ErrorInfo and RequestInfo, what provokes it)"""
    text_and_poison = generation_pb2.TokenIds(ids=[1, poison, 20])
    nobody = generation_pb2.AdapterWeight(adapter="nobody")
    limits = {"RetryInfo", "QuotaFailure"}
    return [
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {"BadRequest"},
         lambda: caller.generate(sampling=generation_pb2.SamplingParams(top_p=2.0))),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", {"BadRequest"},
         lambda: raw(caller, f"{GENERATION}GenerateUnary", b"\xff\xff\xff")),
        ("NOT_FOUND", "ADAPTER_NOT_FOUND", {"ResourceInfo"}, lambda: caller.generate(adapters=[nobody])),
        ("NOT_FOUND", "SOURCE_NOT_FOUND", {"ResourceInfo"}, lambda: caller.load("one", root / "none")),
        ("ALREADY_EXISTS", "ADAPTER_EXISTS", {"ResourceInfo"}, lambda: caller.load("upper", root / "upper")),
        ("PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", {"ResourceInfo"}, lambda: caller.load("one", "/etc")),
        ("PERMISSION_DENIED", "SOURCE_NOT_ALLOWED", {"ResourceInfo"},
         lambda: caller.load("one", "s3://bucket/key")),
        ("FAILED_PRECONDITION", "ADAPTER_NOT_SERVABLE", {"PreconditionFailure"},
         lambda: caller.load("one", root / "spoiled")),
        ("FAILED_PRECONDITION", "NO_ROOM_TO_PIN", {"PreconditionFailure"}, lambda: pinned_out(caller)),
        ("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE", {"PreconditionFailure"},
         lambda: caller.generate(text=None, chat=CHAT)),
        ("RESOURCE_EXHAUSTED", "QUEUE_FULL", limits, lambda: queue_full(caller, until)),
        ("RESOURCE_EXHAUSTED", "TOO_MANY_JOBS", limits, lambda: uploads(caller, until, "RESOURCE_EXHAUSTED")),
        ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", set(),
         lambda: uploads(caller, until, "DEADLINE_EXCEEDED")),
        ("CANCELLED", "ADAPTER_UNLOADED", set(), lambda: unloaded(caller, until, root)),
        ("UNAUTHENTICATED", "UNAUTHENTICATED", set(),
         lambda: raw(caller, f"{ADAPTERS}ListAdapters", b"", metadata=None)),
        ("UNIMPLEMENTED", "UNIMPLEMENTED", set(), lambda: raw(caller, f"{ADAPTERS}Explain", b"")),
        ("INTERNAL", "INTERNAL", set(), lambda: caller.generate(text=None, token_ids=text_and_poison)),
    ]  # fmt: skip


def at_rest(server: LaunchedServer) -> Any:
    """The metrics, once nothing runs and nothing is held; None before."""
    assert server.metrics is not None
    found = scrape(server.metrics)
    names = ("requests_running", "requests_waiting", "kv_cache_blocks_used")
    return None if any(found.value(f"loraplex_{name}") for name in names) else found


def lose_device(caller: Caller, poison: int, until: Until) -> None:
    """The engine is started again, and whoever asks meanwhile is told so."""
    lost = generation_pb2.TokenIds(ids=[1, poison, 20])
    assert unavailable(caller.generate(text=None, token_ids=lost)) == "ENGINE_LOST"
    reasons = {"ENGINE_LOST"}
    until(lambda: (found := caller.generate()) is None or reasons.add(unavailable(found)))
    assert reasons <= {"ENGINE_LOST", "ENGINE_RESTARTING"}
    assert caller.answer(LINES[1], "upper") == expected("upper", LINES[1])


def count(stream: Any) -> int:
    """The number of tokens of a stream."""
    return sum(len(part.token_ids) for part in stream)


def unavailable(failure: Failure | None) -> str:
    """The reason of a failure that is UNAVAILABLE and says when to come again."""
    assert failure is not None
    assert (failure.code, set(failure.details)) == ("UNAVAILABLE", {"RetryInfo"}), failure
    return failure.reason


def test_every_status(tmp_path: Path, faulty: Any, until: Until) -> None:
    root, faults = tmp_path / "root", tmp_path / "faults"
    for name in ("upper", "spoiled"):
        shutil.copytree(data_dir() / "adapters" / "upper", root / name)
    (root / "spoiled" / "adapter_model.safetensors").write_bytes(b"nothing")
    (tmp_path / "tokens").write_text(f"tester sha256:{hashlib.sha256(b'secret').hexdigest()}\n")
    faults.mkdir()
    (faults / "closed").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = [*demo_flags(), "--port", port, "--threads", "1", "--max-num-requests", "1", "--max-queue", "2"]
    flags += ["--max-adapters-on-device", "3", "--max-pinned-adapters", "1"]
    flags += ["--token-file", str(tmp_path / "tokens"), "--adapter-root", str(root), "--drain-seconds", "120"]
    flags += ["--allow-uploads", "--max-uploads", "1", "--adapter-cache-dir", str(tmp_path / "cache")]
    caller = Caller(f"127.0.0.1:{port}", "secret")
    with ThreadPoolExecutor(8) as pool:
        starting = pool.submit(faulty.launch, flags, faults)
        try:
            loading = until(lambda: starting.done() or ((found := caller.list()) and found.reason and found))
            assert unavailable(loading) == "SERVER_STARTING"
        finally:
            (faults / "closed").unlink()
        with starting.result() as server:
            for code, reason, kinds, provoke in statuses(caller, root, faulty.step_fails, until):
                failure = provoke()
                assert failure is not None, reason
                assert (failure.code, failure.reason, set(failure.details)) == (code, reason, kinds)
                assert failure.domain == "loraplex"
                for secret in (faulty.secret, "Traceback", str(tmp_path / "cache"), __file__):
                    assert secret not in str(failure), failure

            # A client's clock may end its call before the server's word arrives: then there is only the code.
            def late() -> bool:
                failure = held_up(caller, faults)
                assert failure is not None
                assert failure.code in ("DEADLINE_EXCEEDED", "CANCELLED")
                return failure.code == "DEADLINE_EXCEEDED"

            assert until(late)

            # None of it harmed the server.
            assert caller.answer(LINES[0], "upper") == expected("upper", LINES[0])
            assert until(lambda: at_rest(server)).value("loraplex_integrity_problems") == 0

            if LONG:
                lose_device(caller, faulty.device_fails, until)

            # SIGTERM with a call running and one waiting: both get their whole answers, a new one is refused.
            answers = until(lambda: one_runs_and_one_waits(caller, server, pool, until))
            (faults / "hold").touch()
            os.kill(server.pid, signal.SIGTERM)
            # One that is in before the signal is heard waits for the engine, in vain.
            refused = until(lambda: (found := caller.list()) and found.code == "UNAVAILABLE" and found)
            assert unavailable(refused) == "SERVER_DRAINING"
            (faults / "hold").unlink()
            assert [answer.result(LONG_S) for answer in answers] == [400, 400]
            caller.channel.close()
            assert server.stop() == 0
