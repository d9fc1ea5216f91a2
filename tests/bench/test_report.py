"""Figures from outcomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_bench.load.answers import Judgement, Verdict
from loraplex_bench.load.generator import LoadResult, Outcome
from loraplex_bench.load.report import jain, parse_goodput, raw_outcome, render, summarize
from loraplex_bench.load.results import Distribution, table, write_json
from loraplex_bench.load.workload import PlannedRequest


def outcome(
    index: int = 0,
    adapter: str | None = "rot13",
    due_s: float = 0.0,
    sent_s: float = 1.0,
    chunks: tuple[tuple[float, int], ...] = ((1.5, 1), (1.6, 1), (1.9, 2)),
    **changes: object,
) -> Outcome:
    adapters = ((adapter, 1.0),) if adapter else ()
    request = PlannedRequest(index, due_s, adapters, "x\n", 8, line="x")
    end_s = chunks[-1][0] if chunks else sent_s
    return Outcome(request, sent_s=sent_s, end_s=end_s, chunks=list(chunks), **changes)  # type: ignore[arg-type]


def test_times_of_one_request():
    found = outcome(due_s=0.75)
    assert found.ttft_s == pytest.approx(0.5)
    assert found.arrival_ttft_s == pytest.approx(0.75)
    assert found.output_tokens == 4
    # Three tokens came in the 0.4 seconds after the first.
    assert found.tpot_s == pytest.approx(0.4 / 3)
    assert found.gaps_s == pytest.approx([0.1, 0.3])
    assert found.e2e_s == pytest.approx(0.9)


def test_a_single_message_has_no_time_per_token():
    found = outcome(chunks=((1.5, 4),))
    assert found.tpot_s is None
    assert found.gaps_s == []


def test_percentiles_are_linear_between_values():
    found = Distribution.of(range(101))
    assert found == Distribution(101, 50, 50, 90, 99, 100)
    assert Distribution.of([1.0, 2.0]) == Distribution(
        2, 1.5, 1.5, pytest.approx(1.9), pytest.approx(1.99), 2.0
    )
    assert Distribution.of([]) is None


def test_jain():
    assert jain([2, 2, 2]) == pytest.approx(1)
    assert jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([]) is None


def test_summary_counts_rates_and_verdicts():
    right, leak = Judgement(Verdict.RIGHT), Judgement(Verdict.LEAK, "leet")
    outcomes = (
        outcome(0, judgement=right, prompt_tokens=3),
        outcome(1, judgement=leak, prompt_tokens=5, text="bad"),
        outcome(2, adapter=None, judgement=right, chunks=((3.0, 1), (3.1, 1))),
        outcome(3, chunks=(), error="UNAVAILABLE"),
    )
    summary = summarize(LoadResult(outcomes, (), 2.0), {"ttft": 1.0})
    assert (summary.completed, summary.failed, summary.errors) == (3, 1, {"UNAVAILABLE": 1})
    assert (summary.prompt_tokens, summary.output_tokens) == (8, 10)
    assert summary.output_throughput == pytest.approx(5)
    assert summary.total_throughput == pytest.approx(9)
    assert summary.goodput == pytest.approx(1)
    assert (summary.right, summary.wrong, summary.leaks) == (2, 0, 1)
    assert summary.accuracy == pytest.approx(2 / 3)
    assert summary.fairness == pytest.approx((0.5 + 2.0) ** 2 / (2 * (0.25 + 4.0)))
    by_label = {adapter.label: adapter for adapter in summary.adapters}
    assert (by_label["rot13"].requests, by_label["rot13"].failed, by_label["rot13"].leaks) == (3, 1, 1)
    text = render(summary)
    assert "1 leaked" in text
    assert "UNAVAILABLE" in text


def test_goodput_thresholds_are_read_in_milliseconds():
    assert parse_goodput(["ttft:500", "e2e:2000"]) == {"ttft": 0.5, "e2e": 2.0}
    for text in ("ttft", "speed:3", "tpot:soon"):
        with pytest.raises(ValueError, match="goodput"):
            parse_goodput([text])


def test_tables_are_aligned():
    assert table(["name", "n"], [["a", 1], ["long", 200]]).splitlines() == [
        "name    n",
        "----  ---",
        "a       1",
        "long  200",
    ]


def test_json_keeps_the_text_of_bad_answers_only(tmp_path: Path):
    good = outcome(judgement=Judgement(Verdict.RIGHT), text="fine")
    bad = outcome(judgement=Judgement(Verdict.LEAK, "leet"), text="bad")
    path = tmp_path / "new" / "run.json"
    write_json(path, {"requests": [raw_outcome(good), raw_outcome(bad)], "d": Distribution.of([1.0])})
    document = json.loads(path.read_text())
    assert document["format"] == 1
    assert document["d"]["p99"] == 1.0
    first, second = document["requests"]
    assert "text" not in first
    assert (second["text"], second["owner"]) == ("bad", "leet")
    assert first["chunks"] == [[1.5, 1], [1.6, 1], [1.9, 2]]
