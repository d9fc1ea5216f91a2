"""Clients, connections, disks and steps that fail under a real server: nobody else notices, nothing is left.

All tests share one server, on which somebody asks all the while and checks the answers. `make test` runs a
quick form, `make faults` the long one.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hashlib
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from loraplex import Client, errors
from loraplex.cli.exposition import Metrics, scrape
from loraplex.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from loraplex_bench.demo.tasks import TASKS, data_dir, expected, prompt, sure_lines
from loraplex_bench.load.launcher import LaunchedServer, child_environment, demo_flags

LONG = os.environ.get("LORAPLEX_FAULTS") == "long"
# A composition takes many seconds: torch and PEFT are imported for it.
COMPOSED = LONG
# Of the extra `remote`.
DOWNLOADS = importlib.util.find_spec("aiohttp") is not None
LINES = sure_lines()
NAMES = list(TASKS)
TYPED = (errors.FailedPreconditionError, errors.NotFoundError, errors.UnavailableError)
Until = Callable[[Callable[[], Any]], Any]


class Scene:
    """The server, and what can be seen of it from outside."""

    def __init__(self, server: LaunchedServer, faulty: Any, folder: Path, url: str, until: Until) -> None:
        self.server = server
        self.faulty = faulty
        self.faults = folder / "faults"
        self.root = folder / "root"
        self.url = url
        self.until = until

    def metrics(self) -> Metrics:
        assert self.server.metrics is not None
        return scrape(self.server.metrics)

    def calls(self, method: str, code: str) -> float:
        """Calls of a method that have ended so."""
        found = self.metrics()
        return found.get("loraplex_grpc_calls_total", method=f"/loraplex.v1.{method}", code=code) or 0.0

    def assert_clean(self, *, audited: bool) -> None:
        """Nothing runs, nothing is held, everyone is served; an audit, which takes seconds to come, finds
        nothing broken."""
        audits = self.metrics().value("loraplex_audits")

        def at_rest() -> Metrics | None:
            found = self.metrics()
            names = ("requests_running", "requests_waiting", "kv_cache_blocks_used")
            rests = not any(found.value(f"loraplex_{name}") for name in names)
            looked_at = not audited or found.value("loraplex_audits") > audits
            return found if rests and looked_at else None

        with Client(self.server.grpc) as client:
            for name in (None, *NAMES[:2]):
                answer = client.generate(prompt(LINES[0]), adapter=name, max_tokens=40)
                assert answer.text == expected(name, LINES[0])
            found = self.until(at_rest)
            assert found.value("loraplex_integrity_problems") == 0
            assert found.value("loraplex_weight_checksum_ok") == 1
            assert found.value("loraplex_engine_restarts_total") == 0
            self.until(lambda: not any(adapter.references for adapter in client.adapters.list()))


@contextlib.contextmanager
def _web(folder: Path) -> Iterator[str]:
    """A web server of a folder's files, and its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join(60)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, faulty: Any, until: Until) -> Iterator[Scene]:
    """The server. Its cache lies on a disk of its own of 128 KiB where that may be mounted, and where not, no
    file may be longer than that."""
    folder = tmp_path_factory.mktemp("faults")
    for name in ("faults", "root", "cache"):
        (folder / name).mkdir()
    limit = f"mount -t tmpfs -o size=128k none '{folder}/cache'"
    shell = ["unshare", "-rm", "sh", "-c", f'{limit} && exec "$0" "$@"']
    if shutil.which("unshare") is None or subprocess.run([*shell, "true"], check=False).returncode:
        shell = ["bash", "-c", 'ulimit -f 128 && exec "$0" "$@"']
    flags = [*demo_flags(), "--threads", "1", "--max-adapters-on-device", "4", "--max-num-requests", "32"]
    flags += ["--keepalive", "1", "--keepalive-timeout", "6", "--stall-seconds", "1"]
    flags += ["--allow-uploads", "--adapter-root", str(folder / "root")]
    flags += ["--adapter-cache-dir", str(folder / "cache")]
    with _web(folder / "root") as url:
        flags += ["--adapter-source", url] if DOWNLOADS else []
        with faulty.launch(flags, folder / "faults", around=shell) as server:
            made = Scene(server, faulty, folder, url, until)
            yield made
            made.assert_clean(audited=True)
            assert server.stop() == 0


@pytest.fixture
def bystanders(scene: Scene) -> Iterator[collections.Counter[str]]:
    """Some who ask all the while; each answer is right. What is counted is how many calls ended so."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[tuple[str | None, str, str]] = []
    over = threading.Event()

    def ask(number: int) -> None:
        rng = random.Random(number)
        with Client(scene.server.grpc, retry=None) as client:
            while not over.is_set():
                name, line = rng.choice([None, *NAMES[:6]]), rng.choice(LINES)
                try:
                    text = client.generate(prompt(line), adapter=name, max_tokens=40).text
                except errors.LoraplexError as error:
                    outcomes[error.code] += 1
                else:
                    outcomes["OK"] += 1
                    if text != expected(name, line):
                        wrong.append((name, line, text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    assert wrong == []
    assert outcomes["OK"] > 0


@pytest.fixture
def clean(scene: Scene) -> Iterator[None]:
    """After the test, and after those who asked meanwhile, nothing is left of it."""
    yield
    scene.assert_clean(audited=LONG)


@pytest.mark.usefixtures("clean")
def test_clients_killed_in_mid_stream(scene: Scene, bystanders: collections.Counter[str]) -> None:
    processes, streams = (10, 50) if LONG else (2, 10)
    command = [sys.executable, str(Path(__file__).with_name("crowd.py")), scene.server.grpc, str(streams)]
    cut = scene.calls("GenerationService/Generate", "CANCELLED")

    def kill_some() -> bool:
        """True if some streams were cut; the processes may die too late for that."""
        crowd = [
            subprocess.Popen([*command, *NAMES[:6]], stdout=subprocess.PIPE, env=child_environment())
            for _ in range(processes)
        ]
        for process in crowd:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            process.kill()
            process.wait()
            process.stdout.close()
        scene.until(lambda: scene.metrics().value("loraplex_requests_waiting") == 0)
        return scene.calls("GenerationService/Generate", "CANCELLED") > cut

    scene.until(kill_some)
    assert set(bystanders) <= {"OK"}


@pytest.mark.usefixtures("clean")
def test_a_storm_of_deadlines(scene: Scene, bystanders: collections.Counter[str]) -> None:
    callers, each = (64, 200) if LONG else (32, 10)
    seen: collections.Counter[str] = collections.Counter()

    async def storm() -> None:
        async with grpc.aio.insecure_channel(scene.server.grpc) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)

            async def caller(number: int) -> None:
                rng = random.Random(number)
                for _ in range(each):
                    request = generation_pb2.GenerateRequest(text=prompt(rng.choice(LINES)))
                    request.stopping.max_tokens, request.stopping.ignore_eos = 200, True
                    if name := rng.choice([None, *NAMES]):
                        request.adapters.add(adapter=name)
                    try:
                        async for _ in stub.Generate(request, timeout=rng.uniform(0.001, 0.05)):
                            pass
                        seen["OK"] += 1
                    except grpc.aio.AioRpcError as error:
                        seen[error.code().name] += 1

            await asyncio.gather(*(caller(number) for number in range(callers)))

    asyncio.run(storm())
    assert sum(seen.values()) == callers * each
    # gRPC resets an expired call; a client whose own clock is not there yet reads that as CANCELLED.
    assert set(seen) <= {"OK", "DEADLINE_EXCEEDED", "CANCELLED"}, seen
    assert set(bystanders) <= {"OK"}


def _unread(channel: grpc.Channel) -> Any:
    """A stream of about 200 KB."""
    request = generation_pb2.GenerateRequest(text=prompt(LINES[0]))
    request.stopping.max_tokens, request.stopping.ignore_eos = 480, True
    request.logprobs = 20
    return generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)


@pytest.mark.usefixtures("clean")
def test_slow_readers_are_told(scene: Scene, bystanders: collections.Counter[str]) -> None:
    count = 40 if LONG else 4
    before = scene.calls("GenerationService/Generate", "RESOURCE_EXHAUSTED")
    # As little as HTTP/2 allows is taken in before it is asked for.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(scene.server.grpc, options)) for _ in range(count)
        ]
        streams = [_unread(channel) for channel in channels]
        scene.until(lambda: scene.calls("GenerationService/Generate", "RESOURCE_EXHAUSTED") == before + count)
        for stream in streams:
            told: list[int] = []
            with pytest.raises(grpc.RpcError) as caught:
                told.extend(len(message.token_ids) for message in stream)
            status = rpc_status.from_call(caught.value)
            assert status is not None
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert b"READER_TOO_SLOW" in status.details[0].value
            assert sum(told) < 480
    assert set(bystanders) <= {"OK"}


class Forwarder:
    """A TCP connection's middle, which can fall silent without closing anything."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._silent = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def silence(self) -> None:
        """From here on nothing passes, and nobody is told."""
        self._silent.set()

    def close(self) -> None:
        self._silent.set()
        # A listener that is merely closed leaves its accept waiting.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pump, args=pair))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._silent.is_set():
                    return
                sink.sendall(data)


@pytest.fixture(autouse=True, scope="module")
def silent_connections(scene: Scene) -> Iterator[float]:
    """Connections with calls on them that fall silent before the first test; how many calls are to end so."""
    count = 20 if LONG else 3
    middle = Forwarder(scene.server.grpc)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with contextlib.ExitStack() as stack:
        stack.callback(middle.close)
        for _ in range(count):
            channel = stack.enter_context(grpc.insecure_channel(middle.address, options))
            watch = adapters_pb2_grpc.AdapterServiceStub(channel).Watch(adapters_pb2.WatchRequest())
            next(watch)
            stack.callback(watch.cancel)
            next(_unread(channel))
        middle.silence()
        yield count


@pytest.mark.usefixtures("clean")
def test_steps_that_fail(scene: Scene, bystanders: collections.Counter[str]) -> None:
    """Whoever is in such a step is told INTERNAL and nothing else; the next step is as good as any."""
    times = 100 if LONG else 10
    failed = scene.metrics().value("loraplex_failed_steps_total")
    with Client(scene.server.grpc, retry=None) as client:
        for _ in range(times):
            with pytest.raises(errors.InternalError) as caught:
                client.generate([1, scene.faulty.step_fails, 20, 4], adapter="upper", max_tokens=8)
            assert scene.faulty.secret not in str(caught.value)
    scene.until(lambda: scene.metrics().value("loraplex_failed_steps_total") == failed + times)
    assert set(bystanders) <= {"OK", "INTERNAL"}


@pytest.mark.usefixtures("clean")
def test_a_disk_that_is_full(scene: Scene, bystanders: collections.Counter[str]) -> None:
    config = (data_dir() / "adapters" / "upper" / "adapter_config.json").read_text()
    large = random.Random(1).randbytes(300_000)

    def upload() -> Iterator[adapters_pb2.UploadAdapterRequest]:
        digest = hashlib.sha256(large).hexdigest()
        header = adapters_pb2.UploadHeader(name="large", config=config, sha256=digest, size=len(large))
        yield adapters_pb2.UploadAdapterRequest(header=header)
        for at in range(0, len(large), 50_000):
            yield adapters_pb2.UploadAdapterRequest(chunk=large[at : at + 50_000])

    with Client(scene.server.grpc, retry=None) as client, grpc.insecure_channel(scene.server.grpc) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        for _ in range(30 if LONG else 3):
            with pytest.raises(grpc.RpcError) as caught:
                stub.UploadAdapter(upload(), timeout=120)
            status = rpc_status.from_call(caught.value)
            assert status is not None, caught.value
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert b"DISK_FULL" in status.details[0].value
        if DOWNLOADS:
            published = scene.root / "far"
            shutil.copytree(data_dir() / "adapters" / "upper", published, dirs_exist_ok=True)
            (published / "adapter_model.safetensors").write_bytes(large)
            with pytest.raises(errors.ResourceExhaustedError) as full:
                client.adapters.load("far", f"{scene.url}far")
            assert full.value.reason == "DISK_FULL", full.value
        if COMPOSED:
            with pytest.raises(errors.LoraplexError) as refused:
                client.adapters.register_composition("wide", "cat", NAMES[:8])
            assert refused.value.reason == "DISK_FULL", refused.value
        # There is room for what fits: what was written of the others is gone, or makes way.
        client.adapters.upload("small", data_dir() / "adapters" / "upper")
        answer = client.generate(prompt(LINES[3]), adapter="small", max_tokens=40)
        assert answer.text == expected("upper", LINES[3])
        client.adapters.unload("small")
        assert sorted(adapter.name for adapter in client.adapters.list()) == sorted(NAMES)
    assert set(bystanders) <= {"OK"}


@pytest.mark.usefixtures("clean")
def test_adapters_that_vanish(scene: Scene, bystanders: collections.Counter[str]) -> None:
    """Files that are cut or removed under a registered adapter: typed errors, and the others go on."""
    with Client(scene.server.grpc, retry=None) as client:
        for number in range(40 if LONG else 4):
            folder = scene.root / f"gone-{number}"
            shutil.copytree(data_dir() / "adapters" / NAMES[number % len(NAMES)], folder)
            client.adapters.load(folder.name, folder)
            if number % 2:
                shutil.rmtree(folder)
            else:
                (folder / "adapter_model.safetensors").write_bytes(b"")
            with contextlib.suppress(*TYPED):
                client.generate(prompt(LINES[0]), adapter=folder.name, max_tokens=8)
            client.adapters.unload(folder.name)
    assert set(bystanders) <= {"OK"}


@pytest.mark.usefixtures("clean")
def test_connections_that_fell_silent(
    scene: Scene, silent_connections: float, bystanders: collections.Counter[str]
) -> None:
    """Their calls end by keepalive: nobody cancels them, and no message of theirs fails."""
    scene.until(lambda: scene.calls("AdapterService/Watch", "CANCELLED") == silent_connections)
    assert set(bystanders) <= {"OK"}


def test_reflection_is_enough_to_call(scene: Scene) -> None:
    """Nothing of ours: services, methods and messages as the server describes them."""
    with grpc.insecure_channel(scene.server.grpc) as channel:
        known = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(known)
        services = {name for name in known.get_services() if name.startswith("loraplex.")}
        assert services == {f"loraplex.v1.{name}Service" for name in ("Generation", "Adapter", "Model")}
        methods = {
            method.full_name: method
            for service in services
            for method in pool.FindServiceByName(service).methods
        }

        def call(name: str, **fields: Any) -> list[Any]:
            method = methods[f"loraplex.v1.{name}"]
            kind = "unary_stream" if method.server_streaming else "unary_unary"
            path = f"/{method.containing_service.full_name}/{method.name}"
            request = GetMessageClass(method.input_type)(**fields)
            response = GetMessageClass(method.output_type)
            made = getattr(channel, kind)(path, type(request).SerializeToString, response.FromString)
            answer = made(request, timeout=120)
            return list(answer) if method.server_streaming else [answer]

        [listed] = call("AdapterService.ListAdapters")
        assert {adapter.name for adapter in listed.adapters} >= set(NAMES)
        asked = {"text": prompt(LINES[0]), "adapters": [{"adapter": "upper"}], "stopping": {"max_tokens": 40}}
        parts = call("GenerationService.Generate", **asked)
        assert "".join(part.text for part in parts) == expected("upper", LINES[0])
        [whole] = call("GenerationService.GenerateUnary", request=asked)
        assert whole.text == expected("upper", LINES[0])
        [model] = call("ModelService.GetModel")
        assert model.model.architecture == "LlamaForCausalLM"
