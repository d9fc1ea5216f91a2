"""The comparison with transformers + PEFT: its arithmetic, its workers, and all of it on a tiny model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loraplex_bench.cli import main
from loraplex_bench.peers.contender import Contender, ContenderError
from loraplex_bench.peers.jobs import BenchModel, Job
from loraplex_bench.scenarios.side_by_side.results import Agreement, Row, find_goals


def row(system: str, weights: str, rate: float, adapters: bool = True) -> Row:
    return Row("m", 1, system, weights, adapters, (rate, rate * 2, rate * 0.5))


def test_goals_are_ratios_of_medians():
    rows = [
        row("peft (a)", "fp32", 10),
        row("peft (b)", "fp32", 50),
        row("peft (b)", "fp32", 80, adapters=False),
        row("engine", "none", 90),
        row("engine", "none", 100, adapters=False),
        row("server", "none", 63),
    ]
    goals = {goal.text: (goal.ratio, goal.goal, goal.met) for goal in find_goals(rows)}
    assert goals == {
        "engine none / PEFT fp32 (a)": (pytest.approx(9.0), 8.0, True),
        "engine none / PEFT fp32 (b)": (pytest.approx(1.8), 2.0, False),
        "engine none: adapters / all base": (pytest.approx(0.9), 0.8, True),
        "server / engine, none": (pytest.approx(0.7), 0.8, False),
    }


def test_agreement_wants_equal_tokens_that_the_adapters_made():
    assert Agreement("m", 1, jobs=8, equal=7, ties=1, differing_from_base=6).holds
    assert not Agreement("m", 1, jobs=8, equal=7, ties=0, differing_from_base=6).holds
    assert not Agreement("m", 1, jobs=8, equal=8, ties=0, differing_from_base=3).holds


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> BenchModel:
    from loraplex_bench.models.random_llama import make_random_llama

    return make_random_llama(tmp_path_factory.mktemp("small"), adapters=3, small=True)


@pytest.mark.slow
def test_peft_answers_alike_alone_and_in_a_padded_batch(small_model: BenchModel):
    rng = random.Random(0)
    jobs = [
        Job(tuple(rng.randrange(4, small_model.vocab_size) for _ in range(5 + 3 * index)), adapter)
        for index, adapter in enumerate((*small_model.names, None, small_model.names[0]))
    ]
    contender = Contender(small_model, {"kind": "peft", "weights": "dense"}, threads=1)
    try:
        assert contender.wait_ready() > 0
        alone, together = contender.run("one_by_one", jobs, 6), contender.run("padded", jobs, 6)
        base = contender.run("padded", [Job(job.prompt, None) for job in jobs], 6)
        gap, largest = contender.margin(jobs[0], alone.token_ids[0])
    finally:
        contender.close()
    assert alone.token_ids == together.token_ids
    assert [len(tokens) for tokens in alone.token_ids] == [6] * 5
    assert [left != right for left, right in zip(alone.token_ids, base.token_ids, strict=True)] == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert 0 < gap < 2 * largest


@pytest.mark.slow
def test_a_contender_that_cannot_start_says_why(small_model: BenchModel, tmp_path: Path):
    missing = BenchModel("missing", tmp_path, tmp_path, ("a",), 10)
    contender = Contender(missing, {"kind": "peft", "weights": "dense"}, threads=1)
    try:
        with pytest.raises(ContenderError, match="exit code"):
            contender.wait_ready()
    finally:
        contender.close()


@pytest.mark.slow
def test_everything_runs_side_by_side_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    what = ["--models", "small", "--threads", "1", "--quantizations", "none", "--num-adapters", "4"]
    size = ["--num-requests", "8", "--max-tokens", "6", "--repeats", "1", "--turn-seconds", "0"]
    assert main(["side-by-side", *what, *size, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "8/8" in out
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())["result"]
    systems = {(row["system"], row["weights"]) for row in result["rows"]}
    assert systems >= {("peft (a)", "fp32"), ("peft (b)", "fp32"), ("engine", "none"), ("server", "none")}
    assert all(rate > 0 for row in result["rows"] for rate in row["tokens_per_s"])
