"""The steps of the warm-up ask for every kernel variant that any step can ask for, and can be run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from loraplex_kernels.attention import LayerShape, plan
from loraplex_kernels.attention.plan import Queries
from loraplex_kernels.lora import tiles as lora_tiles
from loraplex_kernels.pool import Run, tile_rows
from loraplex_kernels.quant import tiles as quant_tiles
from loraplex_server.core.step import StepPlan
from loraplex_server.model.run import warmup

CPU = torch.device("cpu")
# Of an 8B Llama: output columns and blocks of 64 inputs; slices and inputs.
WEIGHTS = ((6144, 64), (4096, 64), (28672, 64), (4096, 224))
SITES = ((3, 4096), (1, 4096), (2, 4096), (1, 14336))
PROCESSORS = 132


def plans(max_tokens: int, slots: int, several: int) -> list[StepPlan]:
    return list(warmup.plans(max_tokens, 8192, slots, several, 16))


def lora_variants(runs: Sequence[Run], dtype: torch.dtype) -> set[tuple[Any, ...]]:
    """The compile-time parameters of each launch: the family's tiles, and the planes."""
    pairs_of: dict[int, int] = {}
    for start, end, adapters in runs:
        for slot, _ in adapters:
            pairs_of[slot] = pairs_of.get(slot, 0) + end - start
    pairs = sum(pairs_of.values())
    rows = tile_rows(pairs, len(pairs_of))
    tiles = sum(-(-count // rows) for count in pairs_of.values())
    config = lora_tiles.choose(rows, pairs, dtype, dtype, CPU)
    return {
        (
            config,
            slices,
            width,
            lora_tiles.planes(config, tiles * (1 if config.stacked else slices), width),
        )
        for slices, width in SITES
    }


@pytest.mark.parametrize("max_tokens", [1, 7, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_product(max_tokens: int, dtype: torch.dtype) -> None:
    def variants(counts: Sequence[int]) -> set[tuple[Any, ...]]:
        return {
            (shape, quant_tiles.choose(rows, *shape, dtype, PROCESSORS))
            for shape in WEIGHTS
            for rows in counts
        }

    counts = sorted({plan.num_tokens for plan in plans(max_tokens, 8, 1)})
    assert counts[-1] == max_tokens
    assert variants(counts) == variants(range(1, max_tokens + 1))


@pytest.mark.parametrize(("max_tokens", "slots", "several"), [(64, 4, 1), (512, 64, 8), (2048, 256, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_mix_of_adapters(max_tokens: int, slots: int, several: int, dtype: torch.dtype) -> None:
    warmed: set[tuple[Any, ...]] = set()
    for step in plans(max_tokens, slots, several):
        if step.runs:
            warmed |= lora_variants(step.runs, dtype)
    rng = random.Random(0)
    for _ in range(400):
        count = rng.choice([1, 1, 2, 3, 8, rng.randint(1, 64)])
        bounds = sorted(rng.sample(range(max_tokens + 1), min(count, max_tokens) + 1))
        runs = []
        for start, end in pairwise(bounds):
            chosen = rng.sample(range(slots), rng.randint(1, min(several, slots)))
            runs.append((start, end, tuple((slot, 1.0) for slot in chosen)))
        missing = lora_variants(runs, dtype) - warmed
        assert not missing, runs


def test_small_and_tall_tiles_of_the_attention() -> None:
    shape = LayerShape(32, 8, 128, torch.bfloat16)
    chosen = set()
    for step in plans(512, 8, 1):
        queries = Queries.of(step.query_start, step.context_len, step.block_start)
        tiles = plan.choose_tiles(queries, shape, roomy=True)
        cut = plan.cut(queries, shape, tiles, 4 * PROCESSORS)
        chosen |= {(tiles.rows, False), (tiles.rows, cut.num_planes > 0)}
    assert chosen == {(16, False), (16, True), (128, False), (128, True)}


@pytest.mark.parametrize("max_tokens", [1, 24])
def test_the_steps_can_be_run(harness: Any, tiny: Any, max_tokens: int) -> None:
    served = harness(
        tiny("Gemma2"),
        scheduler={"max_batch_tokens": max_tokens, "kv_block_size": 4},
        adapters={"max_per_request": 3},
    )
    served.engine._runner.warm_up(64)
    answer = served.submit("r", range(5, 30), [("r6", 1.0)], max_tokens=3, ignore_eos=True)
    served.run()
    plain = harness(tiny("Gemma2"))
    truth = plain.submit("r", range(5, 30), [("r6", 1.0)], max_tokens=3, ignore_eos=True)
    plain.run()
    assert answer.tokens == truth.tokens
