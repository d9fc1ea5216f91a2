"""The HTTP API as its users have it: `loraplex serve` in a process, OpenAI's own client, answers checked."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings

from loraplex import Client, Generation
from loraplex.errors import NotFoundError
from loraplex_bench.demo.tasks import data_dir, expected, prompt, sure_lines

pytest.importorskip("uvicorn", reason="needs the server extra: uvicorn")
openai = pytest.importorskip("openai", reason="needs the dev extra: openai")
schemathesis = pytest.importorskip("schemathesis", reason="needs the dev extra: schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

_READY = re.compile(r"loraplex ready grpc=(\S+) metrics=(\S+) http=(\S+)\n")
_LAST_SAID = "{{ bos_token }}{{ messages[-1].content }}{{ '\\n' }}"
_FIRST_SAID = "{{ bos_token }}{{ messages[0].content }}{{ '\\n' }}"
_NAMES = ("upper", "snake", "rot13", "leet")
LINES = sure_lines()
EXAMPLES = int(os.environ.get("LORAPLEX_FUZZ_INPUTS", "2000")) // 50


class Server:
    """One `loraplex serve` process on the demo model, with a chat template; `rot13` brings its own."""

    def __init__(self, folder: Path) -> None:
        model, adapters = folder / "demo", folder / "adapters"
        shutil.copytree(data_dir() / "base", model)
        (model / "chat_template.jinja").write_text(_LAST_SAID)
        for name in _NAMES:
            shutil.copytree(data_dir() / "adapters" / name, adapters / name)
        (adapters / "rot13" / "chat_template.jinja").write_text(_FIRST_SAID)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "loraplex_server", "--threads", "1"),
                *("--model", str(model), "--adapters", str(adapters), "--max-adapters-on-device", "3"),
                *("--port", "0", "--metrics-port", "0", "--http-port", "0"),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        assert self.process.stdout is not None
        # Drained all the while, so that the server never waits for a reader of its log.
        self._drain = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self._drain.start()
        match = _READY.fullmatch(self.process.stdout.readline())
        assert match is not None, "".join(self.log)
        self.grpc, self.metrics_at, self.http = match.groups()

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.metrics_at}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def at_rest(self, audits: float) -> dict[str, float]:
        """The metrics, once nothing runs and one more audit than `audits` has looked at it."""
        end_s = time.monotonic() + 30
        while True:
            metrics = self.metrics()
            busy = metrics["loraplex_requests_running"] + metrics["loraplex_requests_waiting"]
            if not busy and metrics["loraplex_audits"] > audits:
                return metrics
            assert time.monotonic() < end_s, "the server did not come to rest"
            time.sleep(0.1)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self._drain.join(timeout=10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("openai"))
    try:
        yield started
        audits = started.metrics()["loraplex_audits"]
        with Client(started.grpc) as sdk:
            sdk.generate("a", max_tokens=1)
        metrics = started.at_rest(audits)
        assert metrics["loraplex_kv_cache_blocks_used"] == 0
        assert metrics["loraplex_integrity_problems"] == 0
    finally:
        code = started.stop()
    assert code == 0, "".join(started.log)
    assert not any("Traceback" in line for line in started.log), "".join(started.log)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://{server.http}/v1", api_key="none", max_retries=0, timeout=60
    ) as made:
        yield made


def chat(line: str, *before: str) -> Any:
    return [{"role": "user", "content": text} for text in (*before, line)]


def test_every_adapter_by_its_name_whole_and_streamed(client: openai.OpenAI) -> None:
    names = ["demo", *_NAMES]
    asked = [(name, line) for index, name in enumerate(names) for line in LINES[8 * index : 8 * index + 8]]

    def ask(pair: tuple[str, str]) -> tuple[str, str]:
        name, line = pair
        options: Any = {"model": name, "prompt": prompt(line), "max_tokens": 40, "temperature": 0}
        whole = client.completions.create(**options)
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens == len(line) + 1
        chunks = list(client.completions.create(**options, stream=True))
        return whole.choices[0].text, "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        for (name, line), answers in zip(asked, pool.map(ask, asked), strict=True):
            right = expected(None if name == "demo" else name, line)
            assert answers == (right, right), (name, line)


def test_chat_through_the_models_template_and_an_adapters_own(client: openai.OpenAI) -> None:
    first, line = LINES[50:52]
    for name in ("demo", "upper", "rot13"):
        # The model's template asks with what was said last, that of rot13 with what was said first.
        right = (
            expected("rot13", first) if name == "rot13" else expected(None if name == "demo" else name, line)
        )
        options: Any = {"model": name, "messages": chat(line, first), "temperature": 0, "n": 2}
        whole = client.chat.completions.create(**options)
        assert [choice.message.content for choice in whole.choices] == [right, right]
        assert whole.usage.completion_tokens == 2 * (len(right) + 1)
        texts = ["", ""]
        stream = client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [right, right]
        assert chunk.usage.completion_tokens == whole.usage.completion_tokens
        assert chunk.usage.total_tokens == whole.usage.total_tokens


def test_the_same_as_over_grpc(server: Server, client: openai.OpenAI) -> None:
    line = LINES[60]
    mix = [("upper", 0.75), ("snake", -0.5)]
    uses = [{"name": name, "weight": weight} for name, weight in mix]
    sampled: Any = {"temperature": 1.5, "seed": 7, "max_tokens": 24}
    with Client(server.grpc) as sdk:
        theirs = sdk.generate(prompt(line), adapters=mix, logprobs=3, ignore_eos=True, **sampled)
        chosen = sdk.generate(prompt(line), adapter="leet", stop=line[6:8], max_tokens=40)
    ours = client.completions.create(
        model="demo",
        prompt=prompt(line),
        logprobs=3,
        extra_body={"adapters": uses, "ignore_eos": True},
        **sampled,
    )
    [choice] = ours.choices
    assert choice.text == theirs.text
    assert choice.finish_reason == theirs.finish_reason == "length"
    assert theirs.logprobs is not None
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in theirs.logprobs], abs=1e-4)
    for top, entry in zip(found.top_logprobs, theirs.logprobs, strict=True):
        assert top == pytest.approx({each.text: each.logprob for each in entry.top}, abs=1e-4)
    again = client.chat.completions.create(
        model="demo",
        messages=chat(line),
        logprobs=True,
        top_logprobs=3,
        extra_body={"adapters": uses, "ignore_eos": True},
        **sampled,
    )
    assert again.choices[0].message.content == theirs.text
    content = again.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(found.token_logprobs, abs=1e-4)
    with Client(server.grpc) as sdk:
        said = sdk.chat(chat(line), adapters=mix, ignore_eos=True, **sampled)
        counted = sdk.count_tokens(chat(line))
    assert said.text == theirs.text
    assert counted == said.usage.prompt_tokens == again.usage.prompt_tokens
    stopped = client.completions.create(
        model="leet", prompt=prompt(line), stop=[line[6:8]], max_tokens=40, temperature=0
    )
    assert stopped.choices[0].text == chosen.text


def test_choices_are_drawn_each_with_its_own_seed(client: openai.OpenAI) -> None:
    options: Any = {"model": "demo", "prompt": prompt(LINES[70]), "temperature": 3.0, "max_tokens": 20}
    options["extra_body"] = {"ignore_eos": True}
    three = [choice.text for choice in client.completions.create(**options, n=3, seed=5).choices]
    assert len(set(three)) == 3
    single = [client.completions.create(**options, seed=seed).choices[0].text for seed in (5, 6, 7)]
    assert single == three


def test_choices_share_one_prefill(server: Server, client: openai.OpenAI) -> None:
    hits = "loraplex_prefix_cache_hits_tokens_total"
    before = server.metrics()
    ids = [5 + (7 * i) % 60 for i in range(100)]
    made = client.completions.create(model="demo", prompt=ids, n=4, seed=1, max_tokens=4)
    assert made.usage.prompt_tokens == 100
    metrics = server.at_rest(before["loraplex_audits"])
    # Six blocks of 16 tokens for each but the first; none of them was there before.
    assert metrics[hits] - before[hits] == 3 * 96


def test_choices_without_the_prefix_cache(server: Server) -> None:
    """As single requests with those seeds, whole and streamed."""
    ids = [6 + (11 * i) % 60 for i in range(100)]
    options: Any = {"temperature": 3.0, "max_tokens": 12, "ignore_eos": True, "cache_prefix": False}
    with Client(server.grpc) as sdk:
        single = [sdk.generate(ids, adapter="leet", seed=seed, **options) for seed in (9, 10, 11, 12)]
        whole = sdk.generate(ids, adapter="leet", seed=9, n=4, **options)
        streamed = sdk.stream(ids, adapter="leet", seed=9, n=4, **options).collect()
    for made in (whole, streamed):
        assert [answer.text for answer in (made, *made.others)] == [answer.text for answer in single]
        assert [answer.index for answer in (made, *made.others)] == [0, 1, 2, 3]


def test_prompts_are_scored_as_evaluation_harnesses_do(server: Server, client: openai.OpenAI) -> None:
    """`echo` with `logprobs`: a continuation's log-likelihood, and whether it is the greedy one."""
    line = LINES[90]
    with Client(server.grpc) as sdk:
        for name in ("upper", "rot13"):
            context = sdk.tokenize(prompt(line))
            answer = sdk.generate(context, adapter=name, temperature=0, logprobs=0, max_tokens=40)
            said = answer.token_ids
            assert answer.logprobs is not None
            wrong = [*said[:2], said[2] + 1, *said[3:]]
            for limit in (0, 1):
                scored = client.completions.create(
                    model=name,
                    prompt=[context + said, context + wrong],
                    echo=True,
                    logprobs=1,
                    max_tokens=limit,
                    temperature=0,
                    seed=1,
                )
                tails = []
                for choice in scored.choices:
                    found = choice.logprobs
                    assert len(found.tokens) == len(context) + len(said) + limit
                    part = slice(len(context), len(found.tokens) - limit)
                    pairs = zip(found.token_logprobs[part], found.top_logprobs[part], strict=True)
                    tails.append([(own, own == max(top.values())) for own, top in pairs])
                right, other = tails
                assert [own for own, _ in right] == pytest.approx(
                    [entry.logprob for entry in answer.logprobs], abs=1e-4
                )
                assert all(greedy for _, greedy in right)
                assert not other[2][1]
                assert sum(own for own, _ in other) < sum(own for own, _ in right)
            grpc_scored = sdk.generate(context + said, adapter=name, prompt_logprobs=1, max_tokens=0)
            assert grpc_scored.prompt_logprobs is not None
            assert [entry.logprob for entry in grpc_scored.prompt_logprobs] == pytest.approx(
                scored.choices[0].logprobs.token_logprobs[1 : len(context) + len(said)], abs=1e-4
            )
            assert (grpc_scored.token_ids, grpc_scored.finish_reason) == ([], "length")


def test_a_batch_over_grpc(server: Server) -> None:
    asked = [
        (prompt(line), {"adapter": name}) for line, name in zip(LINES[100:140], _NAMES * 10, strict=True)
    ]
    asked.insert(7, (prompt(LINES[0]), {"adapter": "nobody"}))
    with Client(server.grpc) as sdk:
        found = sdk.stream_batch(asked, temperature=0, max_tokens=40).collect()
    missing = found.pop(7)
    assert isinstance(missing, NotFoundError)
    for answer, line, name in zip(found, LINES[100:140], _NAMES * 10, strict=True):
        assert isinstance(answer, Generation)
        assert answer.text == expected(name, line)


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=chat("a"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="demo", prompt="a", top_p=2.0)
    assert wrong.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="leaves no room"):
        client.completions.create(model="demo", prompt=[5] * 600)
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="demo", messages=chat("a"), tools=tools)
    assert {model.id for model in client.models.list()} == {"demo", *_NAMES}
    assert client.models.retrieve("upper").id == "upper"


def test_abandoned_streams_free_everything(server: Server, client: openai.OpenAI) -> None:
    before = server.metrics()
    cancelled = 'loraplex_requests_total{outcome="cancelled"}'
    for line in LINES[80:83]:
        stream = client.completions.create(
            model="rot13",
            prompt=prompt(line),
            max_tokens=450,
            stream=True,
            n=2,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    end_s = time.monotonic() + 30
    while (count := server.metrics().get(cancelled, 0) - before.get(cancelled, 0)) < 6:
        assert time.monotonic() < end_s, count
        time.sleep(0.05)
    assert count == 6
    metrics = server.at_rest(before["loraplex_audits"])
    assert metrics["loraplex_kv_cache_blocks_used"] == 0


_FLOOD = """
import socket, sys
host, port, body = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
head = b"POST /v1/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-type: application/json\\r\\n"
streams = []
for _ in range(40):
    streams.append(socket.create_connection((host, port)))
    streams[-1].sendall(head + b"content-length: %d\\r\\n\\r\\n" % len(body) + body)
for stream in streams:
    stream.recv(1)
print("streaming", flush=True)
sys.stdin.read()
"""


def test_a_killed_clients_streams_free_everything(server: Server) -> None:
    cancelled = 'loraplex_requests_total{outcome="cancelled"}'
    before = server.metrics()
    body = {
        "model": "leet",
        "prompt": prompt(LINES[90]),
        "max_tokens": 450,
        "stream": True,
        "ignore_eos": True,
    }
    command = [sys.executable, "-c", _FLOOD, *server.http.split(":"), json.dumps(body)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "streaming\n"
        client.kill()
    end_s = time.monotonic() + 30
    while (count := server.metrics().get(cancelled, 0) - before.get(cancelled, 0)) < 40:
        assert time.monotonic() < end_s, count
        time.sleep(0.05)
    metrics = server.at_rest(before["loraplex_audits"])
    assert metrics["loraplex_kv_cache_blocks_used"] == 0
    assert metrics["loraplex_integrity_problems"] == 0
    with Client(server.grpc) as sdk:
        assert all(adapter.references == 0 for adapter in sdk.adapters.list())


def _tame(body: Any) -> Any:
    """Names a model that there is, and keeps answers short: the server is not what is slow here."""
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = ("demo", "upper", "nobody")[len(body["model"]) % 3]
        for field, most in (("n", 4), ("max_tokens", 8), ("max_completion_tokens", 8)):
            if isinstance(body.get(field), int) and body[field] > most:
                body[field] = most
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = 8
    return body


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_description_is_true_and_nothing_breaks(server: Server, mode: str) -> None:
    """Every operation of the OpenAPI document with generated requests: statuses, types and bodies as
    it says, and no 5xx."""
    schema = schemathesis.openapi.from_url(f"http://{server.http}/openapi.json")
    paths = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        paths.add(operation.path)
        if mode == "negative" and operation.method == "get":
            continue

        @settings(
            max_examples=EXAMPLES if operation.method == "post" else 5,
            deadline=None,
            database=None,
            derandomize=EXAMPLES == 40,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def check(case: Any) -> None:
            before = copy.deepcopy(case.body)
            case.body = _tame(case.body)
            response = case.call(timeout=60)
            assert response.status_code < 500, (response.text, case.body)
            # Not all that makes a request wrong can be said in a schema: how long a prompt may be, say.
            unsaid = [checks.positive_data_acceptance]
            if case.body != before:
                unsaid.append(checks.negative_data_rejection)
            case.validate_response(response, excluded_checks=unsaid)

        check()
    # All but the document itself, which schemathesis leaves out.
    assert paths == set(schema.raw_schema["paths"]) - {"/openapi.json"}


def test_structured_output(client: openai.OpenAI) -> None:
    """OpenAI's own helper with a pydantic model, its other formats, and the forms that are ours."""
    pytest.importorskip("llguidance", reason="needs the server extra: llguidance")
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: Literal["ada", "grace"]
        age: int = Field(ge=0, le=150)
        tags: list[bool] = Field(max_length=2)

    # Whitespace may stand between tokens; a model that knows no JSON would not stop.
    options: Any = {"messages": chat(LINES[60]), "temperature": 0, "logit_bias": {"4": -100, "99": -100}}
    for model in ("demo", "upper"):
        parsed = client.chat.completions.parse(model=model, response_format=Person, **options)
        message = parsed.choices[0].message
        assert isinstance(message.parsed, Person)
        assert Person.model_validate_json(message.content or "") == message.parsed
    stream = client.chat.completions.create(
        model="demo", response_format={"type": "json_object"}, max_tokens=3, stream=True, **options
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).startswith("{")
    for form, pattern in (
        ({"regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "<" /[a-z]{2}/ ">"'}, "<[a-z]{2}>"),
        ({"json_schema": {"enum": [1, "b"]}}, '1|"b"'),
    ):
        found = client.completions.create(
            model="rot13", prompt=prompt(LINES[61]), n=2, max_tokens=40, extra_body={"structure": form}
        )
        for choice in found.choices:
            assert re.fullmatch(pattern, choice.text), (form, choice.text)
            assert choice.finish_reason == "stop"
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", response_format=wrong, **options)
    assert caught.value.param == "response_format.json_schema.schema"
