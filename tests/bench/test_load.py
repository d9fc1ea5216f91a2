"""The load harness against a server that does as the test says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraplex import AsyncClient
from loraplex_bench.cli import main
from loraplex_bench.demo.tasks import TASKS, expected
from loraplex_bench.load.answers import Verdict
from loraplex_bench.load.generator import LoadResult, LoadRun
from loraplex_bench.load.report import summarize
from loraplex_bench.load.workload import PlannedRequest, WorkloadConfig, demo_prompts, make_workload


def requests(n: int, **settings: Any) -> list[PlannedRequest]:
    config = WorkloadConfig(n, adapters=tuple(TASKS), adapter_choice="round-robin", **settings)
    return make_workload(config, demo_prompts(1))


def run_load(address: str, planned: list[PlannedRequest], **settings: Any) -> LoadResult:
    async def go() -> LoadResult:
        async with AsyncClient(address, retry=None) as client:
            return await LoadRun(client, planned, **settings).run()

    return asyncio.run(go())


def test_every_token_and_the_servers_own_times_are_recorded(script: Any):
    script.chunk = 3
    result = run_load(script.address, requests(12))
    for outcome in result.outcomes:
        assert outcome.judgement.verdict is Verdict.RIGHT
        assert outcome.output_tokens == len(outcome.text)
        assert [tokens for _, tokens in outcome.chunks[:-1]] == [3] * (len(outcome.chunks) - 1)
        times = [at_s for at_s, _ in outcome.chunks]
        assert times == sorted(times)
        assert outcome.sent_s <= times[0]
        assert times[-1] <= outcome.end_s <= result.duration_s
        assert (outcome.queue_s, outcome.adapter_wait_s) == (0.25, 0.125)
        assert outcome.prompt_tokens == len(outcome.request.line or "") + 2


def test_adapters_and_weights_reach_the_server(script: Any):
    mixture = PlannedRequest(5, 0.0, (("leet", 0.25), ("upper", 0.75)), "mix\n", 4, line="mix")
    planned = [*requests(5), mixture]
    result = run_load(script.address, planned)
    assert sorted(script.seen) == sorted((list(r.adapters), r.prompt) for r in planned)
    assert result.outcomes[-1].judgement.verdict is Verdict.UNCHECKED


def test_an_answer_of_another_adapter_is_a_leak(script: Any):
    script.answer = lambda task, line: expected("leet" if task == "rot13" else task, line)
    summary = summarize(run_load(script.address, requests(32)))
    assert (summary.right, summary.wrong, summary.leaks) == (30, 0, 2)
    result = run_load(script.address, requests(32))
    owners = {o.judgement.owner for o in result.outcomes if o.judgement.verdict is Verdict.LEAK}
    assert owners == {"leet"}


def test_errors_are_results(script: Any):
    script.refuse = lambda task, line: grpc.StatusCode.RESOURCE_EXHAUSTED if task == "upper" else None
    summary = summarize(run_load(script.address, requests(32)))
    assert (summary.completed, summary.errors) == (30, {"RESOURCE_EXHAUSTED": 2})


def test_arrivals_wait_for_no_answer(script: Any):
    # The server answers nobody before all are there: a harness that waits for answers would never get one.
    script.gather = 40
    summary = summarize(run_load(script.address, requests(40, rate=400.0)))
    assert (summary.completed, summary.right) == (40, 40)


def test_max_concurrency_is_kept(script: Any):
    summary = summarize(run_load(script.address, requests(40), max_concurrency=3))
    assert summary.completed == 40
    assert script.most_at_once <= 3


def test_probes_run_beside_the_load_and_are_counted_apart(script: Any):
    result = run_load(script.address, requests(30, rate=60.0), probe_rate=100.0)
    assert len(result.outcomes) == 30
    assert result.probes
    assert all(probe.request.max_tokens == 1 and not probe.request.adapters for probe in result.probes)
    assert summarize(result).probe_s is not None


def test_command_line_measures_and_writes(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.json"
    arguments = [
        "serve",
        "--server",
        script.address,
        "--num-requests",
        "40",
        "--rate",
        "500",
        "--json",
        str(path),
    ]
    assert main([*arguments, "--warmup", "4", "--goodput", "ttft:60000"]) == 0
    out = capsys.readouterr().out
    assert "40 completed, 0 failed" in out
    assert "TPOT" in out
    assert "goodput" in out
    document = json.loads(path.read_text())
    assert document["summary"]["right"] == 40
    assert len(document["requests"]) == 40
    assert len(script.seen) == 44
    assert document["environment"]["python"]
    assert document["model"]["name"] == "base"
    assert str(Path.cwd()) not in path.read_text()


@pytest.mark.parametrize("kind", ["leak", "error", "wrong"])
def test_command_line_fails_on_a_bad_run(script: Any, kind: str, capsys: pytest.CaptureFixture[str]):
    if kind == "leak":
        script.answer = lambda task, line: line
    elif kind == "wrong":
        script.answer = lambda task, line: "~"
    else:
        script.refuse = lambda task, line: grpc.StatusCode.UNAVAILABLE if task == "upper" else None
    arguments = [
        "serve",
        "--server",
        script.address,
        "--num-requests",
        "20",
        "--adapter-choice",
        "round-robin",
    ]
    assert main([*arguments, "--warmup", "0"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "upper,nobody"], "nobody"),
        (["--goodput", "speed:1"], "goodput"),
        (["--prompts", "random", "--input-len", "64"], "--input-len"),
        (["--launch-flags", "--port 0"], "--launch-flags"),
        (["--num-requests", "0"], "num_requests"),
    ],
)
def test_command_line_says_what_is_wrong(
    script: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["serve", "--server", script.address, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    for arguments, words in (
        (["--help"], ("serve", "soak", "side-by-side")),
        (["serve", "--help"], ("examples:", "Zipf", "--probe-rate")),
        (["soak", "--help"], ("examples:", "--duration")),
        (["side-by-side", "--help"], ("examples:", "set_adapter")),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)
