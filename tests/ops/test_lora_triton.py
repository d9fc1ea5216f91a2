"""The Triton LoRA kernels against a float64 oracle: natively on CUDA, else through Triton's interpreter on
CPU.

The interpreter has to be chosen before a kernel module is imported, so without a GPU this file runs itself in
a process of its own, and `TestKernels` is collected only where the kernels can run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loraplex_kernels import dispatch, lora
from loraplex_kernels.lora import tiles
from loraplex_kernels.pool import LoraBatchBuffers, Run

pytest.importorskip("triton")

INTERPRETED = dispatch.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()

MIXED = [(6, 7, 1), (0, 16, 4), (12, 0, 0), (0, 0, 0), (32, 14, 8), (3, 70, 24), (1, 1, 1), (64, 5, 24)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "not kernels_wide")


@pytest.mark.kernels_wide
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_wide_sweep_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "kernels_wide")


class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def triton_kernels(self) -> Iterator[None]:
        dispatch.launches.clear()
        with dispatch.using("triton"):
            yield

    @pytest.fixture(autouse=True)
    def poisoned_h(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The intermediate result is NaN wherever the shrink does not write."""
        monkeypatch.setattr(torch, "empty", functools.partial(torch.full, fill_value=float("nan")))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("tokens", "in_features", "widths", "longest"),
        [
            (1, 40, (24,), 1),
            (5, 1030, (40, 17), 2),
            (17, 96, (64, 32, 32), 2),
            (33, 130, (70, 33, 150, 16), 4),
            (64, 128, (256, 256), 5),
            (200, 70, (90, 33), 90),
        ],
    )
    def test_random_batches(
        self,
        lora_case: Any,
        dtype: torch.dtype,
        tokens: int,
        in_features: int,
        widths: tuple[int, ...],
        longest: int,
    ) -> None:
        ranks = [(*slot_ranks, 9)[: len(widths)] for slot_ranks in MIXED]
        runs = lora_case.random_runs(tokens, tokens, len(ranks), longest)
        if not any(adapters for _, _, adapters in runs):
            runs = [(0, tokens, ((0, 1.0), (4, -0.5)))]
        case = lora_case(
            in_features=in_features,
            widths=widths,
            ranks=ranks,
            runs=runs,
            num_tokens=tokens + 1,
            dtype=dtype,
            device=DEVICE,
        )
        case.run()
        case.check()
        assert dispatch.launches == {"lora.shrink.triton": 1, "lora.expand.triton": 1}

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_adapter_for_all(self, lora_case: Any, dtype: torch.dtype) -> None:
        case = lora_case(
            in_features=192,
            widths=(160, 64),
            ranks=[(128, 12)],
            runs=[(0, 257, ((0, 0.5),))],
            num_tokens=257,
            dtype=dtype,
            device=DEVICE,
        )
        assert case.batch.tile_rows == tiles.PREFILL_ROWS
        case.run()
        case.check()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "longest"), [(7, 3), (40, 9), (140, 140)])
    def test_adapters_in_8_bits(self, lora_case: Any, dtype: torch.dtype, tokens: int, longest: int) -> None:
        ranks = [(6, 7), (0, 16), (12, 0), (33, 14)]
        case = lora_case(
            in_features=144,
            widths=(80, 33),
            ranks=ranks,
            runs=lora_case.random_runs(3 * tokens + 1, tokens, len(ranks), longest),
            num_tokens=tokens,
            dtype=dtype,
            device=DEVICE,
            scaled=True,
        )
        assert case.batch.num_pairs
        case.run()
        case.check()

    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("rows", [1, 3, 90])
    def test_ranks_up_to_the_largest(self, lora_case: Any, rows: int, scaled: bool) -> None:
        case = lora_case(
            in_features=48,
            widths=(40, 24, 16),
            ranks=[(512, 1, 257), (3, 300, 0)],
            runs=[(0, rows, ((0, 1.0),)), (rows, 2 * rows, ((1, -0.5), (0, 0.25)))],
            num_tokens=2 * rows,
            dtype=torch.float32,
            device=DEVICE,
            scaled=scaled,
        )
        case.run()
        case.check()

    @pytest.mark.parametrize("count", range(1, tiles.BUILT_IN["decode", "single"].vector_rows + 3))
    def test_rows_one_by_one_and_together(self, lora_case: Any, count: int) -> None:
        """Around the number of rows from which on a tile takes tensor cores; every plane counts once."""
        case = lora_case(
            in_features=1040,
            widths=(270, 64),
            ranks=[(16, 5), (24, 8)],
            runs=[(0, count, ((1, 1.0),)), (count, 2 * count, ((0, 0.5), (1, 1.0)))],
            num_tokens=2 * count,
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        case.run()
        case.check()

    def test_no_adapter_no_launch(self, lora_case: Any) -> None:
        case = lora_case(
            in_features=64,
            widths=(64,),
            ranks=[(8,)],
            runs=[(0, 4, ())],
            num_tokens=4,
            dtype=torch.float32,
            device=DEVICE,
        )
        assert case.batch.num_pairs == 0
        with pytest.raises(ValueError, match="skip the op"):
            case.run()
        assert not dispatch.launches
        case.check_poison()

    def test_empty_replay_of_a_fixed_grid(self, lora_case: Any) -> None:
        """A graph may be replayed where no token has an adapter: neutral programs leave y alone."""
        from loraplex_kernels.lora import launch

        case = lora_case(
            in_features=64,
            widths=(64, 32),
            ranks=[(8, 8)],
            runs=[],
            num_tokens=4,
            dtype=torch.float32,
            device=DEVICE,
        )
        buffers = LoraBatchBuffers(max_tokens=4, max_pairs=4, device=DEVICE, fixed_grid=True)
        batch = buffers.fill([])
        h = launch.shrink(case.x, case.pool, case.site, batch)
        launch.expand(h, case.pool, case.site, batch, case.y)
        assert bool(h.isnan().all()), "a neutral program wrote"
        case.check_poison()

    def test_a_different_adapter_for_each_token(self, lora_case: Any) -> None:
        case = lora_case(
            in_features=96,
            widths=(96, 32, 32),
            ranks=[(1 + slot, 1 + slot % 16, 6) for slot in range(32)],
            runs=[(token, token + 1, ((31 - token, 1.0),)) for token in range(32)],
            num_tokens=32,
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        case.run()
        case.check()

    def test_four_adapters_on_one_token_in_order(self, lora_case: Any) -> None:
        composition = ((2, 1.0), (0, -0.5), (3, 1.75), (1, 0.3))
        case = lora_case(
            in_features=96,
            widths=(96,),
            ranks=[(6,), (24,), (1,), (16,)],
            runs=[(0, 3, composition), (3, 4, composition[:2]), (4, 6, composition[::-1])],
            num_tokens=6,
            dtype=torch.float32,
            device=DEVICE,
        )
        case.run()
        case.check()
        first = case.y.clone()
        case.y_buffer.copy_(case.before)
        case.run()
        assert torch.equal(case.y, first), "two runs differ in bits"

    def test_many_planes(self, lora_case: Any) -> None:
        case = lora_case(
            in_features=4112,
            widths=(48,),
            ranks=[(16,), (5,)],
            runs=[(0, 2, ((0, 1.0),)), (2, 3, ((1, 1.0),))],
            num_tokens=3,
            dtype=torch.float16,
            device=DEVICE,
        )
        h = lora.shrink(case.x, case.pool, case.site, case.batch)
        assert h.shape[2] == 8
        lora.expand(h, case.pool, case.site, case.batch, case.y)
        case.check()

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.parametrize("rows", [1, 3, 40])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_broken_adapter_stays_with_its_tenant(self, lora_case: Any, rows: int, value: float) -> None:
        case = lora_case(
            in_features=64,
            widths=(64, 32),
            ranks=[(8, 8), (8, 8), (16, 4)],
            runs=[(index * rows, (index + 1) * rows, ((index, 1.0),)) for index in range(3)],
            num_tokens=3 * rows,
            dtype=torch.float32,
            device=DEVICE,
        )
        case.pool.a(1, case.first_entry, 64).fill_(value)
        case.pool.b(1, case.first_entry + 1, 32).fill_(value)
        case.run()
        y = case.y.cpu()
        assert not y[rows : 2 * rows].isfinite().any()
        exact, tolerance = case.oracle()
        others = [*range(rows), *range(2 * rows, 3 * rows)]
        assert ((y.double() - exact).abs() <= tolerance)[others].all()

    def test_fixed_grids_serve_any_batch(self, lora_case: Any) -> None:
        buffers = LoraBatchBuffers(
            max_tokens=12, max_pairs=16, max_segments=8, device=DEVICE, fixed_grid=True
        )
        for seed, runs in enumerate(
            [
                [(token, token + 1, ((token % 8, 1.0),)) for token in range(12)],
                [(3, 5, ((7, 1.0), (2, -1.0)))],
                [(0, 12, ((5, 0.5),))],
            ]
        ):
            case = lora_case(
                in_features=96,
                widths=(64, 40),
                ranks=[slot_ranks[:2] for slot_ranks in MIXED],
                runs=runs,
                num_tokens=12,
                dtype=torch.float32,
                device=DEVICE,
                seed=seed,
            )
            case.batch = buffers.fill(runs)
            case.run()
            case.check()

    def test_slices_apart(self, lora_case: Any) -> None:
        case = lora_case(
            in_features=64,
            widths=(40, 130, 1, 33),
            gap=3,
            ranks=[(4, 9, 17, 2), (0, 3, 3, 0)],
            runs=[(1, 3, ((1, 1.0),)), (4, 8, ((0, 1.0), (1, 1.0)))],
            num_tokens=9,
            dtype=torch.float32,
            device=DEVICE,
        )
        case.run()
        case.check()

    @pytest.mark.skipif(DEVICE != "cuda" or not RUNS_HERE, reason="needs a GPU: CUDA graphs")
    @pytest.mark.parametrize("pdl", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_one_graph_serves_any_mix(self, lora_case: Any, scaled: bool, pdl: bool) -> None:
        """Captured with four adapters; replayed with more, fewer, others, one for all, and none."""
        if pdl and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs Hopper or newer: programmatic dependent launch")
        table = {key: dataclasses.replace(config, pdl=pdl) for key, config in tiles.BUILT_IN.items()}
        everyone: list[Run] = [(token, token + 1, ((token % 8, 1.0),)) for token in range(16)]
        case = lora_case(
            runs=everyone,
            in_features=1024,
            widths=(1032, 64, 64),
            ranks=MIXED,
            num_tokens=16,
            dtype=torch.bfloat16,
            device=DEVICE,
            scaled=scaled,
        )
        buffers = LoraBatchBuffers(
            max_tokens=16, max_pairs=32, max_segments=8, device=DEVICE, fixed_grid=True
        )
        captured: list[Run] = [(token, token + 1, ((token % 4, 1.0),)) for token in range(8)]
        case.batch = buffers.fill(captured)
        with tiles.using(table):
            case.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with tiles.using(table), torch.cuda.graph(graph):
            case.run()
        mixes: tuple[list[Run], ...] = (
            captured,
            [(2, 3, ((6, 1.0),))],
            [(0, 16, ((5, 1.0), (7, -0.5)))],
            everyone,
            [],
            [(0, 16, ((4, 1.0),))],
            captured,
        )
        for runs in mixes:
            buffers.fill(runs)
            case.runs = runs
            case.y_buffer.copy_(case.before)
            graph.replay()
            case.check()

    @pytest.mark.skipif(DEVICE != "cuda" or not RUNS_HERE, reason="needs a GPU: races show there alone")
    @pytest.mark.parametrize(("tokens", "longest"), [(3, 1), (64, 2), (300, 60)])
    def test_the_same_bits_every_time(self, lora_case: Any, tokens: int, longest: int) -> None:
        case = lora_case(
            in_features=2048,
            widths=(2048, 512, 512),
            ranks=MIXED,
            runs=lora_case.random_runs(tokens + 2, tokens, len(MIXED), longest),
            num_tokens=tokens,
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        case.run()
        case.check()
        first = case.y.clone()
        for _ in range(20):
            case.y_buffer.copy_(case.before)
            case.run()
            assert torch.equal(case.y, first)

    @pytest.mark.kernels_wide
    @pytest.mark.parametrize("seed", range(120))
    def test_wide_sweep(self, lora_case: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        dtype = DTYPES[seed % 3]
        num_slots = [1, 3, 8, 24][between(0, 3)]
        num_slices = between(1, 4)
        top_rank = [8, 32, 128, 512][between(0, 3)]
        ranks = [[max(0, between(-2, top_rank)) for _ in range(num_slices)] for _ in range(num_slots)]
        tokens = [between(1, 4), between(5, 40), between(41, 300)][between(0, 2)]
        longest = max(1, tokens // 8)
        runs = lora_case.random_runs(seed, tokens, num_slots, longest)
        if not any(adapters for _, _, adapters in runs):
            runs = [(0, tokens, ((0, -1.5),))]
        case = lora_case(
            in_features=between(1, 300),
            widths=tuple(between(1, 150) for _ in range(num_slices)),
            gap=between(0, 2),
            ranks=ranks,
            runs=runs,
            num_tokens=tokens + between(0, 3),
            dtype=dtype,
            device=DEVICE,
            seed=seed,
            scaled=between(0, 2) == 0,
        )
        case.run()
        case.check()
