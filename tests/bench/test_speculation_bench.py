"""The speculation bench: its arithmetic, and all of it on a real server with the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_bench.cli import main
from loraplex_bench.scenarios.speculation import OWNERS, Config, Record, judge, render, summarize

LINE = "abcdefgh 12"


def records(text: str = LINE) -> list[Record]:
    """Two lines, 10 tokens after the first one each; with drafts in half the steps and half the time."""
    found = []
    for index in range(2):
        line = f"{LINE}{index}"
        found.append(Record("(base)", line, False, 0.1, line, 11, 0, 0))
        found.append(Record("(base)", line, True, 0.05, f"{text}{index}", 11, 8, 5))
    return found


def test_time_is_compared_by_owner() -> None:
    (row,) = summarize(records())
    assert (row.owner, row.plain_s, row.speculative_s) == ("(base)", 0.1, 0.05)
    assert (row.speedup, row.per_step, row.right) == (2.0, 2.0, 0.625)
    verdict = judge(records())
    assert verdict.good
    text = render(Config(), [row], verdict)
    assert "2 of 2 are the same; 0 are wrong" in text


def test_an_answer_that_differs_is_bad() -> None:
    verdict = judge(records("xbcdefgh 12"))
    assert len(verdict.different) == len(verdict.wrong) == 2
    assert not verdict.good


@pytest.mark.slow
def test_the_demo_model_answers_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speculation", "--num-requests", "3", "--output", str(tmp_path)]) == 0
    assert "12 of 12 are the same; 0 are wrong" in capsys.readouterr().out
    document = json.loads(next(tmp_path.glob("speculation-*.json")).read_text())
    assert [row["owner"] for row in document["rows"]] == list(OWNERS)
    by_owner = {row["owner"]: row for row in document["rows"]}
    # Who copies has the next tokens drafted; who changes every letter does not.
    assert by_owner["(base)"]["per_step"] > 1.5
    assert by_owner["atbash"]["per_step"] < by_owner["(base)"]["per_step"]
