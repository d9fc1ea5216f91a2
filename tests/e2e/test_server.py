"""The whole path as a user has it: `loraplex serve` in a process, the SDK over gRPC, answers checked."""

from __future__ import annotations

import asyncio
import doctest
import importlib
import itertools
import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import loraplex
from loraplex import Choice, Client, Grammar, JsonSchema, Regex, errors
from loraplex_bench.demo.tasks import TASKS, data_dir, expected, make_lines, prompt, sure_lines

_READY = re.compile(r"loraplex ready grpc=(\S+) metrics=(\S+)\n")


class Server:
    """One `loraplex serve` process on the demo model."""

    def __init__(self, *flags: str) -> None:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "loraplex_server",
            "--port",
            "0",
            "--metrics-port",
            "0",
        ]
        command += ["--model", str(data_dir() / "base"), "--adapters", str(data_dir() / "adapters")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [*command, "--threads", "1", *flags],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Drained all the while, so that the server never waits for a reader of its log.
        self.log: list[str] = []
        assert self.process.stderr is not None
        self._drain = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self._drain.start()
        assert self.process.stdout is not None
        match = _READY.fullmatch(self.process.stdout.readline())
        assert match is not None, "".join(self.log)
        self.address, self.metrics_address = match.groups()

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self._drain.join(timeout=10)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == "", "stdout carries the ready line and nothing else"
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server("--quantization", "nf4", "--max-adapters-on-device", "3", "--max-num-requests", "16")
    yield started
    code = started.stop()
    assert code == 0, "".join(started.log)
    assert not any("Traceback" in line for line in started.log), "".join(started.log)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as made:
        yield made


def idle(server: Server) -> dict[str, float]:
    """Waits until nothing runs and an audit has looked at it; returns the metrics of then."""
    audits = server.metrics()["loraplex_audits"]
    end_s = time.monotonic() + 30
    while True:
        metrics = server.metrics()
        busy = metrics["loraplex_requests_running"] + metrics["loraplex_requests_waiting"]
        if not busy and metrics["loraplex_audits"] > audits:
            return metrics
        assert time.monotonic() < end_s, "the server did not come to rest"
        time.sleep(0.2)


def shown(server: Server, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The metrics, once they are as they should be."""
    end_s = time.monotonic() + 30
    while not condition(metrics := server.metrics()):
        assert time.monotonic() < end_s, "the metrics did not come to that"
        time.sleep(0.05)
    return metrics


def test_copies_are_guessed_and_the_same(server: Server, client: Client) -> None:
    before = shown(server, lambda metrics: not metrics["loraplex_requests_running"])
    for line in make_lines(7, 3):
        with client.stream(prompt(line), speculative_tokens=8) as stream:
            answer = stream.collect()
        assert answer.text == expected(None, line)
        assert len(answer.token_ids) == answer.usage.completion_tokens
        assert 0 < answer.usage.accepted_tokens <= answer.usage.drafted_tokens
        assert client.generate(prompt(line)).token_ids == answer.token_ids
    for name in ("loraplex_drafted_tokens_total", "loraplex_accepted_tokens_total"):
        shown(server, lambda metrics, name=name: metrics[name] > before[name])


def test_every_adapter_and_the_base_at_once_through_three_slots(server: Server, client: Client) -> None:
    """204 requests, all adapters mixed: every answer is its own adapter's, and nothing is held at the end."""
    names: list[str | None] = [*TASKS, None]
    asked = [(name, line) for seed, name in enumerate(names) for line in make_lines(seed, 12)]
    asked.sort(key=lambda pair: pair[1])

    def ask(pair: tuple[str | None, str]) -> str:
        name, line = pair
        return client.generate(prompt(line), adapter=name, max_tokens=40).text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, asked))
    wrong = [
        (name, line, text)
        for (name, line), text in zip(asked, answers, strict=True)
        if text != expected(name, line)
    ]
    # The adapters are right in 99% of all lines or more; a leak would be wrong in all.
    assert len(wrong) <= len(asked) // 50, wrong
    for name, line, text in wrong:
        assert text not in {expected(other, line) for other in names if other != name}, f"{name} leaked"
    metrics = idle(server)
    assert metrics["loraplex_kv_cache_blocks_used"] == 0
    assert metrics["loraplex_integrity_problems"] == 0
    assert metrics["loraplex_weight_checksum_ok"] == 1
    assert metrics['loraplex_adapter_evictions_total{tier="device"}'] > 0
    assert all(adapter.references == 0 for adapter in client.adapters.list())


def test_streams_compose_to_the_unary_answer(client: Client) -> None:
    line = make_lines(100, 1)[0]
    whole = client.generate(prompt(line), adapter="upper", max_tokens=40, logprobs=2)
    chunks = list(client.stream(prompt(line), adapter="upper", max_tokens=40))
    assert "".join(chunk.text for chunk in chunks) == whole.text == expected("upper", line)
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)
    assert whole.finish_reason == chunks[-1].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(whole.token_ids) == len(line) + 1
    assert whole.logprobs is not None
    assert len(whole.logprobs) == len(whole.token_ids)
    assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in whole.logprobs)


def test_compositions_stop_strings_and_seeds(client: Client) -> None:
    line = make_lines(101, 1)[0]
    both = client.generate(prompt(line), adapters=[("upper", 1.0), ("snake", 1.0)], max_tokens=40)
    assert both.text != expected("upper", line)
    half = line[: len(line) // 2]
    cut = client.generate(prompt(line), stop=[line[len(half) : len(half) + 2]], max_tokens=40)
    assert line.startswith(cut.text)
    assert cut.stop_match == line[len(half) : len(half) + 2]
    drawn = [
        client.generate(prompt(line), temperature=3.0, seed=seed, max_tokens=20, ignore_eos=True).token_ids
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_errors_are_typed_and_the_server_goes_on(client: Client) -> None:
    line = make_lines(102, 1)[0]
    with pytest.raises(errors.NotFoundError, match="nobody"):
        client.generate(prompt(line), adapter="nobody")
    with pytest.raises(errors.InvalidRequestError) as caught:
        client.generate(prompt(line), top_p=2.0)
    assert [violation.field for violation in caught.value.field_violations] == ["sampling.top_p"]
    with pytest.raises(errors.InvalidRequestError, match="prompt"):
        client.generate([5] * 600)
    with pytest.raises(errors.DeadlineExceededError):
        client.generate(prompt(line), max_tokens=400, ignore_eos=True, timeout=0.3)
    with pytest.raises(errors.PermissionDeniedError):
        client.adapters.load("stranger", "/etc")
    assert client.generate(prompt(line), max_tokens=40).text == line


@pytest.mark.slow
def test_abandoned_streams_free_everything(server: Server, client: Client) -> None:
    streams = [
        client.stream(prompt(line), adapter="rot13", max_tokens=400, ignore_eos=True)
        for line in make_lines(103, 6)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    metrics = idle(server)
    assert metrics["loraplex_kv_cache_blocks_used"] == 0
    assert metrics["loraplex_integrity_problems"] == 0
    assert client.adapters.get("rot13").references == 0


def test_adapters_come_and_go_at_run_time(client: Client) -> None:
    line = make_lines(104, 1)[0]
    source = str(data_dir() / "adapters" / "atbash")
    loaded = client.adapters.load("mirror", source)
    assert (loaded.name, loaded.pinned) == ("mirror", False)
    assert client.generate(prompt(line), adapter="mirror", max_tokens=40).text == expected("atbash", line)
    with pytest.raises(errors.AlreadyExistsError):
        client.adapters.load("mirror", source)
    assert client.adapters.pin("mirror").pinned
    assert client.adapters.get("mirror").content_hash == client.adapters.get("mirror").content_hash != ""
    remaining = client.adapters.unload("mirror")
    assert "mirror" not in {adapter.name for adapter in remaining}
    with pytest.raises(errors.NotFoundError):
        client.generate(prompt(line), adapter="mirror")


def test_a_new_version_is_swapped_in_under_load(client: Client) -> None:
    lines = make_lines(107, 12)
    folder = data_dir() / "adapters"
    first = client.adapters.load("swapped", folder / "atbash")
    assert [adapter.name for adapter in client.adapters.prefetch(["swapped"])] == ["swapped"]

    def ask(line: str) -> str:
        return client.generate(prompt(line), adapter="swapped", max_tokens=40).text

    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(ask, line) for line in lines]
        second = client.adapters.load("swapped", folder / "rot13", load_inplace=True)
        with pytest.raises(errors.NotFoundError):
            client.adapters.load("swapped", folder / "nothing", load_inplace=True)
        answers = [future.result() for future in running]
    assert first.content_hash != second.content_hash == client.adapters.get("swapped").content_hash
    for line, text in zip(lines, answers, strict=True):
        assert text in (expected("atbash", line), expected("rot13", line)), "one version or the other, whole"
    assert [ask(line) for line in lines] == [expected("rot13", line) for line in lines]

    stream = client.stream(prompt(lines[0]), adapter="swapped", max_tokens=200, ignore_eos=True)
    next(stream)
    remaining = client.adapters.unload("swapped", grace_seconds=0)
    assert "swapped" not in {adapter.name for adapter in remaining}
    with pytest.raises(errors.RequestCancelledError, match="'swapped' was unloaded"):
        stream.collect()


def test_what_happens_to_adapters_can_be_watched(client: Client) -> None:
    folder = data_dir() / "adapters"
    with client.adapters.watch(timeout=60) as watch:
        assert {adapter.name for adapter in next(watch).adapters} >= set(TASKS)

        def until_told(told: Callable[[str, Any], bool]) -> None:
            for changes in watch:
                news = [*((adapter.name, adapter) for adapter in changes.adapters)]
                if any(told(*piece) for piece in [*news, *((name, None) for name in changes.removed)]):
                    return

        first = client.adapters.load("watched", folder / "upper")
        until_told(lambda name, now: name == "watched" and now is not None and now.state == "host")
        client.adapters.load("watched", folder / "title", load_inplace=True)
        until_told(lambda name, now: name == "watched" and now and now.content_hash != first.content_hash)
        client.adapters.prefetch(["watched"])
        until_told(lambda name, now: name == "watched" and now is not None and now.state == "device")
        client.adapters.pin("watched")
        until_told(lambda name, now: name == "watched" and now is not None and now.pinned)
        client.adapters.unload("watched")
        until_told(lambda name, now: name == "watched" and now is None)


def test_an_adapter_comes_from_s3_and_a_watched_folder(
    s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for path in (data_dir() / "adapters" / "atbash").iterdir():
        body = path.read_bytes()
        s3_server.put({f"models/team/atbash/{path.name}": body, f"models/secret/{path.name}": body})
    watched = tmp_path / "watched"
    watched.mkdir()
    started = Server(
        *("--adapter-source", "s3://models/team/", "--adapter-cache-dir", str(tmp_path / "cache")),
        *("--adapters", str(watched), "--watch-adapters", "0.1"),
    )
    line = make_lines(106, 1)[0]
    try:
        with Client(started.address) as client:
            loaded = client.adapters.load("mirror", "s3://models/team/atbash")
            assert loaded.source == "s3://models/team/atbash"
            answer = client.generate(prompt(line), adapter="mirror", max_tokens=40)
            assert answer.text == expected("atbash", line)
            with pytest.raises(errors.PermissionDeniedError, match="--adapter-source"):
                client.adapters.load("other", "s3://models/secret")
            with pytest.raises(errors.NotFoundError, match=r"s3://models/team/nothing"):
                client.adapters.load("other", "s3://models/team/nothing")

            shutil.copytree(data_dir() / "adapters" / "upper", watched / "shout")
            until(lambda: "shout" in {adapter.name for adapter in client.adapters.list()})
            answer = client.generate(prompt(line), adapter="shout", max_tokens=40)
            assert answer.text == expected("upper", line)
            shutil.rmtree(watched / "shout")
            until(lambda: "shout" not in {adapter.name for adapter in client.adapters.list()})
            assert "mirror" not in {adapter.name for adapter in client.adapters.unload("mirror")}
    finally:
        assert started.stop() == 0, "".join(started.log)
    assert not any("Traceback" in text for text in started.log), "".join(started.log)


def test_adapters_are_sent_and_combined(tmp_path: Path, client: Client) -> None:
    folder = data_dir() / "adapters"
    with pytest.raises(errors.PermissionDeniedError, match="--allow-uploads"):
        client.adapters.upload("mine", folder / "atbash")
    started = Server(
        *("--allow-uploads", "--upload-max-bytes", "1MiB", "--adapter-cache-dir", str(tmp_path / "cache")),
    )
    lines = make_lines(108, 4)
    sent: list[tuple[int, int]] = []
    try:
        with Client(started.address) as other:
            mine = other.adapters.upload("mine", folder / "atbash", progress=lambda *now: sent.append(now))
            assert mine.content_hash == other.adapters.load("plain", folder / "atbash").content_hash
            assert sent[-1] == ((folder / "atbash" / "adapter_model.safetensors").stat().st_size,) * 2
            answers = [other.generate(prompt(line), adapter="mine", max_tokens=40).text for line in lines]
            assert answers == [expected("atbash", line) for line in lines]
            with pytest.raises(errors.AlreadyExistsError, match="load_inplace"):
                other.adapters.upload("mine", folder / "rot13")
            other.adapters.upload("mine", folder / "rot13", load_inplace=True)
            answers = [other.generate(prompt(line), adapter="mine", max_tokens=40).text for line in lines]
            assert answers == [expected("rot13", line) for line in lines]
            large = tmp_path / "large"
            shutil.copytree(folder / "atbash", large)
            with (large / "adapter_model.safetensors").open("ab") as file:
                file.truncate(2 << 20)
            with pytest.raises(errors.InvalidRequestError, match="--upload-max-bytes"):
                other.adapters.upload("large", large)
            with (large / "adapter_model.safetensors").open("ab") as file:
                file.truncate(1000)
            with pytest.raises(errors.FailedPreconditionError, match="'large'"):
                other.adapters.upload("large", large)

            mix = [("upper", 0.8), ("vowelmask", 0.7)]
            both = other.adapters.register_composition("both", "cat", mix)
            assert (both.source, both.state) == ("cat(upper*0.8, vowelmask*0.7)", "host")
            for line in lines:
                alone = other.generate(prompt(line), adapter="both", max_tokens=40)
                assert alone.text == other.generate(prompt(line), adapters=mix, max_tokens=40).text
            with pytest.raises(errors.NotFoundError, match="'nobody'"):
                other.adapters.register_composition("worse", "cat", ["upper", "nobody"])
            with pytest.raises(errors.InvalidRequestError, match="density"):
                other.adapters.register_composition("worse", "ties", ["upper", "vowelmask"])
            assert {"mine", "both"} <= {adapter.name for adapter in other.adapters.list()}
            before = started.metrics()['loraplex_adapter_used_bytes{tier="host"}']
            for name in ("mine", "both"):
                remaining = other.adapters.unload(name)
                assert name not in {adapter.name for adapter in remaining}
            until(lambda: started.metrics()['loraplex_adapter_used_bytes{tier="host"}'] < before)
            assert list((tmp_path / "cache" / "staging").iterdir()) == []
    finally:
        assert started.stop() == 0, "".join(started.log)
    assert not any("Traceback" in text for text in started.log), "".join(started.log)


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


class _Examples(doctest.DocTestParser):
    """Examples name the address that a server has unasked; this one has another."""

    def __init__(self, address: str) -> None:
        self._address = address

    def parse(self, string: str, name: str = "<string>") -> Any:
        return super().parse(string.replace("127.0.0.1:50051", self._address), name)


def test_the_examples_in_the_sdk_s_documentation(server: Server) -> None:
    names = {name: getattr(loraplex, name) for name in loraplex.__all__} | vars(errors) | {"asyncio": asyncio}
    finder = doctest.DocTestFinder(parser=_Examples(server.address))
    runner = doctest.DocTestRunner()
    report: list[str] = []
    tried = set()
    for module in pkgutil.walk_packages(loraplex.__path__, "loraplex."):
        for test in finder.find(importlib.import_module(module.name), globs=dict(names)):
            if test.examples:
                runner.run(test, out=report.append)
                tried.add(test.name)
    for test in finder.find(loraplex, globs={}):
        runner.run(test, out=report.append)
        tried.add(test.name)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    assert tried >= {
        "loraplex",
        "loraplex._async.adapters.AsyncAdapters",
        "loraplex._async.client.AsyncClient",
        "loraplex._config.Timeouts",
        "loraplex._hooks.CallHook",
        "loraplex._sync.adapters.Adapters",
        "loraplex._sync.client.Client",
        "loraplex.errors",
    }


def test_health_and_model(server: Server, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "loraplex.v1.GenerationService", "loraplex.v1.AdapterService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
    model = client.model()
    assert (model.architecture, model.quantization, model.device) == ("LlamaForCausalLM", "nf4", model.device)
    assert model.max_adapters_on_device == 3
    assert len(model.weight_checksum) == 64


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_other_weights_give_the_same_answers(quantization: str) -> None:
    started = Server("--quantization", quantization)
    try:
        with Client(started.address) as client:
            names: list[str | None] = [*TASKS, None]
            with ThreadPoolExecutor(17) as pool:
                lines = make_lines(7, len(names))
                answers = list(
                    pool.map(
                        lambda pair: client.generate(prompt(pair[1]), adapter=pair[0], max_tokens=40).text,
                        zip(names, lines, strict=True),
                    )
                )
            right = sum(
                text == expected(name, line) for name, line, text in zip(names, lines, answers, strict=True)
            )
            assert right >= len(names) - 1
    finally:
        assert started.stop() == 0


@pytest.mark.slow
def test_a_second_signal_is_not_needed_and_running_requests_drain() -> None:
    """SIGTERM while everybody answers: each answer is its own and comes to its end."""
    started = Server("--quantization", "nf4")
    line = sure_lines()[0]
    names: list[str | None] = [*TASKS, None] * 2
    with Client(started.address) as client, ThreadPoolExecutor(len(names)) as pool:
        streams = [
            client.stream(prompt(line), adapter=name, max_tokens=150, ignore_eos=True) for name in names
        ]
        begun = list(pool.map(next, streams))
        started.process.send_signal(signal.SIGTERM)
        # The signal takes a moment to be heard.
        asked = (client.generate(prompt(line), max_tokens=1, timeout=30) for _ in itertools.count())
        with pytest.raises(errors.UnavailableError):
            list(asked)
        rest = list(pool.map(list, streams))
    assert {chunks[-1].finish_reason for chunks in rest} == {"length"}
    for name, first, chunks in zip(names, begun, rest, strict=True):
        assert sum(len(chunk.token_ids) for chunk in (first, *chunks)) == 150
        assert "".join(chunk.text for chunk in (first, *chunks)).startswith(expected(name, line))
    assert started.stop() == 0


@pytest.mark.slow
def test_signals_until_the_very_end_leave_the_exit_code_alone() -> None:
    started = Server("--quantization", "nf4")
    ends = time.monotonic() + 60
    while started.process.poll() is None and time.monotonic() < ends:
        started.process.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert started.stop() == 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-m", "loraplex_server"),
                *("--model", str(data_dir() / "base"), "--port", str(port), "--metrics-port", "-1"),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode != 0
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_of_a_given_form_beside_free_text(server: Server, client: Client) -> None:
    """Every kind, with adapters, all at once; the free answers are what they should be."""
    pytest.importorskip("llguidance", reason="needs the server extra: llguidance")
    person = {
        "type": "object",
        "properties": {
            "name": {"enum": ["ada", "grace"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    forms = {
        JsonSchema(json.dumps(person)): lambda text: json.loads(text)["name"] in ("ada", "grace"),
        Regex("[a-f]{3}-[0-9]{4}"): re.compile("[a-f]{3}-[0-9]{4}").fullmatch,
        Choice(("yes", "no", "a|b")): lambda text: text in ("yes", "no", "a|b"),
        Grammar('start: "<" /[a-z]{2,4}/ ">"'): re.compile("<[a-z]{2,4}>").fullmatch,
    }
    names, lines = [None, "upper", "rot13"], sure_lines()[:3]

    def ask(one: tuple[Any, str | None, str]) -> Any:
        form, name, line = one
        return client.generate(prompt(line), adapter=name, max_tokens=60, structure=form)

    free = [(None, name, line) for name, line in zip(names, lines, strict=True)]
    held = [(form, name, line) for form in forms for name, line in zip(names, lines, strict=True)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, held + free))
    for (form, name, _), answer in zip(held, answers, strict=False):
        assert forms[form](answer.text), (form, name, answer.text)
        assert answer.finish_reason == "stop"
    assert [answer.text for answer in answers[len(held) :]] == [
        expected(name, line) for _, name, line in free
    ]
    text = "".join(chunk.text for chunk in client.stream(prompt("a"), structure=Choice(["no, never"])))
    assert text == "no, never"
    for form, field in (
        (JsonSchema({"type": "strin"}), "structure.json_schema"),
        (Regex("["), "structure.regex"),
        (Grammar("start: nothing"), "structure.grammar"),
        (Regex("a" * (300 << 10)), "structure.regex"),
    ):
        with pytest.raises(errors.InvalidRequestError) as caught:
            client.generate(prompt("a"), structure=form)
        assert [violation.field for violation in caught.value.field_violations] == [field]
    assert idle(server)["loraplex_kv_cache_blocks_used"] == 0
