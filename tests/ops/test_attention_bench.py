"""The attention bench compares like with like: its floors are counted right, its peers compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex_bench.ops.attention import (
    Heads,
    Workload,
    gpu_workloads,
    make_inputs,
    padded_peer,
    per_sequence_peer,
)
from loraplex_bench.ops.timers import Ceilings
from loraplex_kernels.attention import write_kv

STEPS = {
    "decodes": [(1, 70)] * 3,
    "ragged": [(1, 70), (1, 5), (1, 33)],
    "prompts": [(40, 40)] * 2,
    "mixed": [(1, 30), (17, 17), (9, 50)],
}


def workload(step: str, window: int | None) -> Workload:
    return Workload(step, STEPS[step], Heads(6, 2, 32), sliding_window=window)


@pytest.mark.parametrize("window", [None, 1, 12, 200])
@pytest.mark.parametrize("step", STEPS)
def test_floors_count_what_is_visible(step: str, window: int | None) -> None:
    load = workload(step, window)
    pairs = keys = 0
    for query, context in load.sequences:
        position, key = np.arange(context - query, context)[:, None], np.arange(context)
        visible = (key <= position) & (key > position - (window or context))
        pairs += int(visible.sum())
        keys += int(visible.any(axis=0).sum())
    queries = sum(query for query, _ in load.sequences)
    assert load.flops() == 4 * pairs * 6 * 32
    assert load.least_bytes(4, 1) == keys * 2 * 2 * 32 + queries * 2 * 6 * 32 * 4
    least, flops = load.least_bytes(4, 1), load.flops()
    limits = {"bytes": Ceilings(1e6, 1e30), "flops": Ceilings(1e30, 1e6)}
    assert limits["bytes"].floor_us(least, flops) == pytest.approx(least)
    assert limits["flops"].floor_us(least, flops) == pytest.approx(flops)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("step", STEPS)
def test_peers_compute_the_same(step: str, window: int | None) -> None:
    load = workload(step, window)
    inputs = make_inputs(load, torch.float32, torch.float32, torch.device("cpu"), layers=1)
    batch = inputs.build()
    write_kv(inputs.k, inputs.v, inputs.caches[0], batch)
    want = inputs.attend(batch, inputs.caches[0])
    per_sequence = per_sequence_peer(inputs, inputs.caches[0])
    padded = padded_peer(inputs, inputs.caches[0])
    assert per_sequence is not None
    assert (padded is None) == (step == "mixed" or (step == "prompts" and window is not None))
    for peer in (per_sequence, padded):
        if peer is not None:
            torch.testing.assert_close(peer(), want)


def test_workloads_have_distinct_names_and_fit() -> None:
    loads = gpu_workloads()
    assert len({load.name for load in loads}) == len(loads)
    for load in loads:
        assert all(1 <= query <= context for query, context in load.sequences)
        assert load.least_bytes(2, 2) < 4 << 30
