"""The soak: its own judgement, and a short one on the real server."""

from __future__ import annotations

import pytest

from loraplex_bench.scenarios.checks import MemorySample, memory_check
from loraplex_bench.scenarios.soak.command import render, soak
from loraplex_bench.scenarios.soak.state import SoakConfig, Version, possible_tasks

MIB = 1 << 20


def samples(growth_per_s: float, seconds: int = 200) -> list[MemorySample]:
    start = 300 * MIB
    return [MemorySample(float(at), 1 << 30, int(start + growth_per_s * at)) for at in range(seconds)]


def test_flat_memory_passes_and_a_leak_does_not():
    assert memory_check(samples(0.0), 200).passed
    assert memory_check(samples(0.05 * MIB), 200).passed
    assert not memory_check(samples(0.5 * MIB), 200).passed


def test_growth_during_the_warm_up_is_allowed():
    warm = [MemorySample(float(at), 0, (100 + 4 * at) * MIB) for at in range(50)]
    assert memory_check([*warm, *(s for s in samples(0.0) if s.at_s >= 50)], 200).passed


def test_too_few_samples_do_not_pass():
    assert not memory_check(samples(0.0, seconds=3), 3).passed


def test_more_slots_than_adapters_is_refused():
    with pytest.raises(ValueError, match="adapters"):
        soak(SoakConfig(adapters=3, slots=3))


def test_a_request_after_a_replacement_may_not_be_answered_by_the_old_version():
    old, new = Version("rot13", 0.0, 10.0), Version("leet", 9.0)
    assert possible_tasks([old, new], 1.0, 2.0) == ["rot13"]
    assert possible_tasks([old, new], 8.5, 9.5) == ["rot13", "leet"]
    assert possible_tasks([old, new], 9.9, 30.0) == ["rot13", "leet"]
    assert possible_tasks([old, new], 10.1, 30.0) == ["leet"]


@pytest.mark.slow
def test_a_short_soak_of_the_real_server_leaves_nothing_behind():
    result = soak(SoakConfig(duration_s=20.0, concurrency=12, crash_interval_s=3.0))
    assert result.passed, render(result)
    assert result.events["answers: right"] > 50
    assert result.events["adapters replaced in place"] > 3
    assert len(result.memory) > 10
