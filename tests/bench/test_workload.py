"""Workloads: the same for a seed, and distributed as they say."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import pytest

from loraplex_bench.demo.tasks import TASKS, answers_differ
from loraplex_bench.load.workload import (
    LengthRange,
    PlannedRequest,
    WorkloadConfig,
    demo_prompts,
    make_workload,
    random_prompts,
    text_prompts,
)

NAMES = tuple(TASKS)


def workload(num_requests: int = 2000, **settings: object) -> list[PlannedRequest]:
    config = WorkloadConfig(num_requests, adapters=NAMES, **settings)  # type: ignore[arg-type]
    return make_workload(config, random_prompts(LengthRange(4, 8), 100))


def test_a_seed_fixes_everything():
    assert workload(50, rate=3.0, seed=7) == workload(50, rate=3.0, seed=7)
    assert workload(50, rate=3.0, seed=7) != workload(50, rate=3.0, seed=8)


def test_changing_the_rate_changes_nothing_but_arrivals():
    slow, fast = workload(50, rate=1.0), workload(50, rate=9.0, adapter_choice="zipf")
    assert [(r.adapters, r.prompt) for r in slow] == [(r.adapters, r.prompt) for r in fast]
    assert [r.at_s for r in slow] != [r.at_s for r in fast]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_asked_for(burstiness: float):
    times = [request.at_s for request in workload(20_000, rate=5.0, burstiness=burstiness)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 5.0, rel=0.06)
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.06)


def test_infinite_rate_is_all_at_once():
    assert {request.at_s for request in workload(20)} == {0.0}


def test_zipf_gives_rank_k_its_share():
    counts = Counter(request.label for request in workload(20_000, zipf=1.2))
    shares = [(rank + 1) ** -1.2 for rank in range(len(NAMES))]
    for name, share in zip(NAMES, shares, strict=True):
        assert counts[name] / 20_000 == pytest.approx(share / sum(shares), abs=0.012)


def test_uniform_round_robin_single_and_none():
    counts = Counter(request.label for request in workload(8_000, adapter_choice="uniform"))
    assert min(counts.values()) > 0.8 * 8_000 / len(NAMES)
    assert len(counts) == len(NAMES)
    turns = [request.label for request in workload(40, adapter_choice="round-robin")]
    assert turns == [NAMES[index % len(NAMES)] for index in range(40)]
    assert {request.label for request in workload(40, adapter_choice="single")} == {NAMES[0]}
    assert {request.label for request in workload(40, adapter_choice="none")} == {"base"}


def test_fractions_of_base_and_compositions():
    requests = workload(10_000, base_fraction=0.2, composition_fraction=0.5)
    sizes = Counter(len(request.adapters) for request in requests)
    assert sizes[0] / 10_000 == pytest.approx(0.2, abs=0.02)
    assert sizes[2] / 10_000 == pytest.approx(0.4, abs=0.02)
    for request in requests:
        if len(request.adapters) == 2:
            (first, one), (second, other) = request.adapters
            assert first != second
            assert one + other == pytest.approx(1)
            with pytest.raises(ValueError, match="mixture"):
                _ = request.task


def test_demo_prompts_ask_about_lines_that_tell_adapters_apart():
    requests = make_workload(WorkloadConfig(50, adapters=NAMES), demo_prompts(3))
    assert all(request.line is not None and answers_differ(request.line) for request in requests)
    assert len({request.line for request in requests}) == 50
    assert all(request.prompt == f"{request.line}\n" for request in requests)


def test_random_prompts_keep_to_lengths_and_vocabulary():
    requests = make_workload(WorkloadConfig(500), random_prompts(LengthRange(3, 9), 17))
    assert {len(request.prompt) for request in requests} == set(range(3, 10))
    assert {token for request in requests for token in request.prompt} == set(range(17))


def test_max_tokens_are_drawn_from_their_range():
    requests = workload(500, max_tokens=LengthRange(5, 7))
    assert {request.max_tokens for request in requests} == {5, 6, 7}


def test_task_of_an_adapter_beside_one_without_weight():
    request = PlannedRequest(0, 0.0, (("leet", 0.0), ("rot13", 1.0)), "x", 4)
    assert request.task == "rot13"
    assert request.label == "0*leet+rot13"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_requests": 0}, "num_requests"),
        ({"rate": 0.0}, "rate"),
        ({"burstiness": 0.0}, "burstiness"),
        ({"zipf": -1.0}, "zipf"),
        ({"base_fraction": 1.5}, "base_fraction"),
        ({"composition_fraction": 0.5, "adapters": ("one",)}, "composition_fraction"),
        ({"adapter_choice": "loudest"}, "adapter_choice"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], field: str):
    with pytest.raises(ValueError, match=f"^{field}: "):
        WorkloadConfig(**{"num_requests": 1, **settings})  # type: ignore[arg-type]


def test_length_ranges_are_read_and_checked():
    assert LengthRange.parse("64") == LengthRange(64, 64)
    assert LengthRange.parse("8:32") == LengthRange(8, 32)
    for text in ("", "x", "9:3", "0:4"):
        with pytest.raises(ValueError):
            LengthRange.parse(text)


def test_no_texts_is_an_error():
    with pytest.raises(ValueError, match="prompts"):
        text_prompts([])
