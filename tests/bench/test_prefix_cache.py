"""The prefix-cache bench: its arithmetic, and all of it on two real servers with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex_bench.cli import main
from loraplex_bench.scenarios.prefix_cache import Config, Record, judge, render, summarize


def records(different: bool = False, cached: int = 96) -> list[Record]:
    """Three requests to the base at each server: 100 ms without the cache, 10 ms with a filled one."""
    found = []
    for index in range(3):
        found.append(Record("off", "(base)", index, 0.1, 0.2, 100, 0, (1, 2, index)))
        token = 9 if different and index == 2 else 2
        ttft_s = 0.01 if index else 0.1
        found.append(
            Record("on", "(base)", index, ttft_s, 0.2, 100, cached if index else 0, (1, token, index))
        )
    return found


def test_what_is_compared_is_the_median_after_the_first_request():
    off, on = summarize(records())
    assert (off.mode, off.ttft_p50_s, off.cached_share) == ("off", 0.1, 0.0)
    assert (on.mode, on.first_ttft_s, on.ttft_p50_s, on.cached_share) == ("on", 0.1, 0.01, 0.96)
    verdict = judge(records())
    assert verdict.speedup == {"(base)": pytest.approx(10.0)}
    assert verdict.good
    text = render("m", Config(), [off, on], verdict)
    assert "10.0 times shorter with the cache (goal: 5): met" in text
    assert "3 of 3 are the same" in text


def test_an_answer_that_differs_or_an_empty_cache_is_bad():
    verdict = judge(records(different=True))
    assert (verdict.different, verdict.good) == ((("(base)", 2),), False)
    assert not judge(records(cached=0)).good


@pytest.mark.slow
def test_two_servers_answer_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    what = [
        "--small",
        "--prefix-tokens",
        "70",
        "--suffix-tokens",
        "5",
        "--max-tokens",
        "6",
        "--num-requests",
        "2",
    ]
    assert main(["prefix-cache", *what, "--output", str(tmp_path)]) == 0
    assert "8 of 8 are the same" in capsys.readouterr().out
    document = json.loads(next(tmp_path.glob("prefix-cache-*.json")).read_text())
    one_by_one, at_once = [], []
    for entry in document["requests"]:
        found = entry["mode"], entry["index"], entry["cached_prompt_tokens"]
        (at_once if "at once" in entry["owner"] else one_by_one).append(found)
    assert sorted(one_by_one) == sorted(
        2
        * [(mode, index, 64 if mode == "on" and index else 0) for mode in ("off", "on") for index in range(3)]
    )
    # One of the two computes what both begin with.
    assert sorted(cached for _, _, cached in at_once) == [0, 0, 0, 64]
    assert document["environment"]["packages"]["torch"]
