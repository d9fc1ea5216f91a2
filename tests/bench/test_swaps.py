"""The benches of swapping, small, on real servers; and what they make of what they find."""

from __future__ import annotations

import dataclasses

import pytest

from loraplex_bench.scenarios import many_adapters, swap_latency
from loraplex_bench.scenarios.many_adapters import ManyConfig
from loraplex_bench.scenarios.swap_latency import SwapConfig


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="--slots"):
        SwapConfig(slots=17)
    with pytest.raises(ValueError, match="--load"):
        SwapConfig(load=0)
    with pytest.raises(ValueError, match="--slots"):
        ManyConfig(adapters=8, slots=8)
    with pytest.raises(ValueError, match="--requests"):
        ManyConfig(requests=3, turns=4)


def test_misses_are_grouped_by_bytes_and_the_slope_is_time_per_byte() -> None:
    moved = [(size * 1000, 0.01 + size * 1e-5) for size in range(1, 101)]
    groups = list(many_adapters._by_size(moved))
    assert [group.count for group in groups] == [25] * 4
    assert [group.bytes for group in groups] == [13_000, 38_000, 63_000, 88_000]
    assert groups[0].wait_s.p50 < groups[3].wait_s.p50
    assert many_adapters._slope(moved) == pytest.approx(1e-8)


def test_plain_lru_is_worked_out_for_the_same_requests() -> None:
    assert many_adapters._lru_hits("abacbbca", 2) == 3
    assert many_adapters._lru_hits("aaaa", 1) == 3


@pytest.mark.slow
def test_more_adapters_than_slots_on_real_servers() -> None:
    config = SwapConfig(slots=3, turns=1, turn_s=1.5, capacity_requests=30, concurrency=16)
    result = swap_latency.swap_latency(config)
    sides = (result.one_each, result.two_each)
    assert [side.adapters for side in sides] == [3, 6]
    for side in sides:
        assert side.summary.right == side.summary.completed > 0
        assert side.summary.failed == 0
    assert result.one_each.swapped_ttft_s is None, "where all have a slot nobody waits"
    assert result.two_each.swapped_ttft_s is not None
    # Both servers were asked the same, at the same moments, but for the copies' names.
    asked = [[(one.request.at_s, one.request.line) for one in side] for side in result.outcomes]
    assert asked[0] == asked[1]
    assert "in 3: adapter brought in" in swap_latency.render(result)


@pytest.mark.slow
def test_many_adapters_on_real_servers() -> None:
    config = ManyConfig(adapters=20, slots=4, requests=40, turns=1, concurrency=4)
    result = many_adapters.many_adapters(config)
    checks = {check.name: check for check in result.checks}
    assert checks["answers"].passed, checks["answers"].detail
    assert "from 20 adapters" in checks["answers"].detail
    assert 0 < result.hit_rate < 1
    assert result.register_s > 0
    assert sum(group.count for group in result.misses) == round((1 - result.hit_rate) * 40)
    assert dataclasses.replace(result, checks=()).passed
    assert "a miss that moves" in many_adapters.render(result)
