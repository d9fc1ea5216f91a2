"""The Triton attention kernels against SDPA in float64: natively on CUDA, else through Triton's interpreter.

The interpreter has to be chosen before a kernel module is imported, so without a GPU this file runs itself in
a process of its own, and `TestKernels` is collected only where the kernels can run.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loraplex_kernels import dispatch
from loraplex_kernels.attention import (
    AttentionBatch,
    AttentionBuffers,
    LayerShape,
    kv_cache_shape,
    packed,
    paged_attention,
    tiles,
    write_cells,
    write_kv,
)
from loraplex_kernels.attention import plan as planning
from loraplex_kernels.attention.plan import Queries
from loraplex_kernels.attention.tiles import AttentionTiles

INTERPRETED = dispatch.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_HERE = dispatch.triton_installed() and (INTERPRETED or torch.cuda.is_available())
needs_graphs = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

Lengths = Sequence[tuple[int, int]]
"""Per sequence: (query_len, context_len)."""


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "not kernels_wide", "TestKernels")


@pytest.mark.kernels_wide
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_wide_sweep_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "kernels_wide", "TestKernels")


@dataclass
class Problem:
    """A step over a cache that holds `poison` in every cell that no query may see."""

    lengths: Lengths
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    poison: float = math.nan
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        self.scale = self.head_dim**-0.5 * 1.5 if self.scale is None else self.scale
        cache_dtype = self.cache_dtype or self.dtype
        counts = [-(-context // self.block_size) + int(rng.integers(0, 3)) for _, context in self.lengths]
        total = sum(counts) + 3
        self.blocks = rng.permutation(total)[: sum(counts)]
        self.block_start = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.query_start = np.concatenate(([0], np.cumsum([query for query, _ in self.lengths])))
        self.context_len = np.array([context for _, context in self.lengths])
        num_tokens = int(self.query_start[-1])

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        def held(context: int) -> torch.Tensor:
            values = normal(context, self.heads[1], self.head_dim)
            # The interpreter rounds to narrow floats wrongly: there, only what needs no rounding is cached.
            return values.to(cache_dtype).to(self.dtype) if INTERPRETED else values

        self.q = normal(num_tokens, self.heads[0], self.head_dim).to(DEVICE)
        histories = [[held(context) for _ in range(2)] for _, context in self.lengths]
        shape = kv_cache_shape(total, self.block_size, self.heads[1], self.head_dim)
        cache = torch.full(shape, self.poison)
        slots, own, self.histories = [], [], []
        for table, (query, context), history in zip(
            np.split(self.blocks, self.block_start[1:-1]), self.lengths, histories, strict=True
        ):
            first = context - query
            seen = np.arange(0 if self.window is None else max(0, first - self.window + 1), first)
            stored = [tensor.to(cache_dtype) for tensor in history]
            for half in range(2):
                cache[table[seen // self.block_size], half, :, seen % self.block_size] = stored[half][
                    seen
                ].float()
            positions = np.arange(first, context)
            slots.append(table[positions // self.block_size] * self.block_size + positions % self.block_size)
            own.append([tensor[first:] for tensor in history])
            self.histories.append([tensor.to(DEVICE).double() for tensor in stored])
        self.cache = cache.to(cache_dtype).to(DEVICE)
        self.slots = np.concatenate(slots).astype(np.int64)
        self.k, self.v = (torch.cat([pair[half] for pair in own]).to(DEVICE) for half in range(2))

    @property
    def step(self) -> tuple[Any, ...]:
        """The arguments of `AttentionBatch.build`."""
        return (self.query_start, self.context_len, self.block_start, self.blocks, self.slots)

    @property
    def shape(self) -> LayerShape:
        return LayerShape(*self.heads, self.head_dim, self.dtype, self.window)

    def build(self) -> AttentionBatch:
        return AttentionBatch.build(*self.step, block_size=self.block_size, device=DEVICE)

    def run(self, batch: AttentionBatch | None = None) -> torch.Tensor:
        batch = batch or self.build()
        write_kv(self.k, self.v, self.cache, batch)
        return self.attend(batch)

    def attend(self, batch: AttentionBatch) -> torch.Tensor:
        assert self.scale is not None
        return paged_attention(
            self.q,
            self.cache,
            batch,
            scale=self.scale,
            sliding_window=self.window,
            softcap=self.softcap,
            k=self.k,
            v=self.v,
        )

    def truth(self) -> torch.Tensor:
        """SDPA in float64, sequence by sequence, over what the cache was given."""
        assert self.scale is not None
        out = []
        for index, (query, context) in enumerate(self.lengths):
            rows = self.q[self.query_start[index] : self.query_start[index + 1]].double().transpose(0, 1)
            keys, values = (
                tensor.transpose(0, 1).repeat_interleave(self.heads[0] // self.heads[1], 0)
                for tensor in self.histories[index]
            )
            position = torch.arange(context - query, context, device=DEVICE)[:, None]
            key = torch.arange(context, device=DEVICE)
            visible = key <= position
            if self.window is not None:
                visible &= key > position - self.window
            if self.softcap is None:
                result = F.scaled_dot_product_attention(
                    rows, keys, values, attn_mask=visible, scale=self.scale
                )
            else:
                logits = self.softcap * torch.tanh(rows @ keys.mT * self.scale / self.softcap)
                result = torch.softmax(logits.masked_fill(~visible, -math.inf), -1) @ values
            out.append(result.transpose(0, 1))
        return torch.cat(out)

    def check(self, out: torch.Tensor, slack: float = 1) -> None:
        """Weights are rounded to the queries' dtype, results once more; sums are float32."""
        assert out.dtype == self.dtype
        assert out.shape == self.q.shape
        truth = self.truth()
        epsilon = torch.finfo(self.dtype).eps
        largest = max(float(values.abs().max()) for _, values in self.histories)
        error = (out.double() - truth).abs()
        allowed = slack * (epsilon * (truth.abs() + largest) + 1e-5 * largest)
        worst = (error / allowed).nan_to_num(nan=math.inf).max()
        assert worst <= 1, f"an error is {worst} times the tolerance"


def random_lengths(seed: int, sequences: int, longest: int = 90) -> Lengths:
    """Decodes, whole prompts and chunks of prompts in any order."""
    rng = np.random.default_rng(seed)
    lengths = []
    for kind in rng.integers(0, 4, sequences):
        context = int(rng.integers(1, longest))
        query = {0: 1, 1: 1, 2: context}.get(int(kind), int(rng.integers(1, context + 1)))
        lengths.append((query, context))
    return lengths


HEADS = [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1), (6, 1), (14, 2), (8, 1), (20, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def triton_kernels(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Triton, into outputs and planes full of NaN."""
        empty = torch.empty

        def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
            made = empty(*shape, **options)
            return made.fill_(math.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, "empty", poisoned)
        dispatch.launches.clear()
        with dispatch.using("triton"):
            yield

    @pytest.mark.parametrize(
        ("sequences", "heads", "head_dim", "dtype", "window", "softcap"),
        [
            (1, (2, 2), 64, torch.float32, None, None),
            (2, (4, 2), 80, torch.float16, None, 3.0),
            (3, (3, 1), 96, torch.bfloat16, 7, None),
            (5, (8, 2), 128, torch.float16, 20, 2.0),
            (9, (5, 1), 24, torch.float32, 1, 3.0),
            (16, (6, 1), 40, torch.bfloat16, None, None),
            (17, (14, 2), 16, torch.float16, 33, None),
            (33, (8, 1), 32, torch.float32, None, 30.0),
            (4, (20, 1), 256, torch.bfloat16, 40, None),
        ],
    )
    def test_random_ragged_batches(
        self,
        sequences: int,
        heads: tuple[int, int],
        head_dim: int,
        dtype: torch.dtype,
        window: int | None,
        softcap: float | None,
    ) -> None:
        lengths = random_lengths(sequences, sequences, 90 if sequences < 9 else 30)
        problem = Problem(lengths, heads, head_dim, dtype=dtype, window=window, softcap=softcap)
        problem.check(problem.run())
        assert dispatch.launches == {"attention.write.triton": 1, "attention.triton": 1}

    @pytest.mark.kernels_wide
    @pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
    @pytest.mark.parametrize("window", [None, 1, 50])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
    def test_wide(self, head_dim: int, dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
        seed = head_dim + (window or 0)
        for sequences, heads, block_size in ((1, 0, 16), (4, 2, 1), (11, 3, 8), (33, 7, 32)):
            problem = Problem(
                random_lengths(seed + sequences, sequences, 200 if sequences < 10 else 60),
                HEADS[(heads + seed) % len(HEADS)],
                head_dim,
                block_size,
                dtype,
                window=window,
                softcap=softcap,
                seed=seed,
            )
            problem.check(problem.run())

    @pytest.mark.kernels_wide
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("window", [None, 300, 777])
    @pytest.mark.parametrize("query", [1, 3, 130])
    def test_wide_long_contexts(self, query: int, window: int | None, dtype: torch.dtype) -> None:
        lengths = [(query, 1900), (1, 515), (query, 1024), (1, 3)]
        problem = Problem(lengths, (4, 1), 64, dtype=dtype, window=window)
        problem.check(problem.run())
        if query < 10:
            # Long chunks make tiles enough as they are.
            assert (dispatch.launches["attention.merge.triton"] == 1) == (window != 300)

    @pytest.mark.parametrize(("block_size", "window"), [(1, None), (7, 16), (16, None), (64, 16)])
    def test_edges_of_pages_and_blocks_of_keys(self, block_size: int, window: int | None) -> None:
        contexts = [1, 15, 16, 17, 33, 63, 64, 65, 129]
        lengths = [(1 + index % 2 * (context // 2), context) for index, context in enumerate(contexts)]
        problem = Problem(lengths, (2, 1), 16, block_size, torch.float16, window=window)
        problem.check(problem.run())

    @pytest.mark.parametrize(
        ("dtype", "window"), [(torch.bfloat16, None), (torch.float16, 70), (torch.bfloat16, 150)]
    )
    def test_tall_tiles_and_their_phases(self, dtype: torch.dtype, window: int | None) -> None:
        """Keys hidden from some rows, seen by all, hidden again: in long prompts and chunks of them."""
        problem = Problem([(200, 200), (60, 270), (1, 40)], (6, 2), 32, dtype=dtype, window=window)
        batch = problem.build()
        assert batch.tables.plan(problem.shape).tiles.phases
        problem.check(problem.run(batch))

    @pytest.mark.parametrize(
        ("lengths", "heads", "window", "dtype"),
        [
            ([(1, 1500)], (4, 1), None, torch.bfloat16),
            ([(1, 900), (1, 5), (3, 1100)], (4, 2), None, torch.float32),
            ([(1, 1400), (2, 1500)], (2, 1), 1100, torch.float16),
            ([(20, 700)], (2, 1), None, torch.float32),
        ],
        ids=["lone", "ragged", "window", "chunk"],
    )
    def test_long_contexts_are_divided(
        self, lengths: Lengths, heads: tuple[int, int], window: int | None, dtype: torch.dtype
    ) -> None:
        problem = Problem(lengths, heads, 16, dtype=dtype, window=window)
        batch = problem.build()
        assert batch.tables.plan(problem.shape).num_planes > 1
        out = problem.run(batch)
        problem.check(out)
        assert dispatch.launches["attention.merge.triton"] == 1
        assert torch.equal(out, problem.run()), "two runs differ in bits"

    @pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 9)])
    def test_other_cells_cannot_leak(self, dtype: torch.dtype, window: int | None) -> None:
        lengths = [(1, 17), (20, 20), (6, 31), (1, 64), (1, 530)]
        results = []
        for poison in (math.nan, math.inf, 1e30, 0.0):
            problem = Problem(lengths, (4, 1), dtype=dtype, window=window, poison=poison)
            results.append(problem.run())
        problem.check(results[0])
        for other in results[1:]:
            assert torch.equal(results[0], other)

    def test_transposed_inputs_and_a_negative_scale(self) -> None:
        """Modelling code hands over [Hq, T, D] seen as [T, Hq, D]."""
        problem = Problem([(1, 12), (5, 5), (3, 20)], scale=-0.3)
        want = problem.run()
        problem.check(want)
        for name in ("q", "k", "v"):
            tensor = getattr(problem, name).transpose(0, 1).contiguous().transpose(0, 1)
            setattr(problem, name, tensor)
        assert torch.equal(problem.run(), want)
        problem.q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(problem.run(), want)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_a_scale_of_zero_weighs_all_alike(self, softcap: float | None) -> None:
        problem = Problem([(1, 12), (5, 5), (3, 20)], scale=0.0, window=7, softcap=softcap)
        problem.check(problem.run())

    def test_large_logits(self) -> None:
        """The largest of a row is taken off before the exponential; what is left is a logit's rounding."""
        problem = Problem([(1, 70), (9, 40)], scale=30.0)
        problem.check(problem.run(), slack=30)
        problem.softcap = 200.0
        problem.check(problem.run(), slack=30)

    def test_write_touches_only_its_cells(self) -> None:
        problem = Problem([(1, 12), (5, 5), (3, 20)], (3, 3), 24, poison=7.0, cache_dtype=torch.bfloat16)
        want = problem.cache.clone()
        for row, slot in enumerate(problem.slots.tolist()):
            block, offset = divmod(slot, problem.block_size)
            want[block, 0, :, offset] = problem.k[row].bfloat16()
            want[block, 1, :, offset] = problem.v[row].bfloat16()
        write_kv(problem.k, problem.v, problem.cache, problem.build())
        assert torch.equal(problem.cache, want)

    def test_write_of_cells_that_no_step_computed(self) -> None:
        """Strided rows, as a prefix has them: those of one layer out of all."""
        problem = Problem([(1, 12), (5, 5), (3, 20)], (3, 3), 24, poison=7.0, cache_dtype=torch.bfloat16)
        slots, heads = torch.tensor([3, 40, 17], device=DEVICE), problem.cache.shape[2]
        rows = torch.randn(3, 2, 2, heads, 24, device=DEVICE).bfloat16().float()
        want = problem.cache.clone()
        for row, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, problem.block_size)
            want[block, :, :, offset] = rows[row, 1].bfloat16()
        found = problem.cache.clone()
        write_cells(rows[:, 1, 0], rows[:, 1, 1], found, slots)
        assert torch.equal(found, want)
        with dispatch.using("torch"):
            write_cells(rows[:, 1, 0], rows[:, 1, 1], problem.cache, slots)
        assert torch.equal(problem.cache, want)
        with pytest.raises(ValueError, match="as the cells and the cache say"):
            write_cells(rows[:2, 1, 0], rows[:, 1, 1], found, slots)

    @pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_cache_of_another_dtype(self, cache_dtype: torch.dtype) -> None:
        problem = Problem([(1, 12), (50, 50), (3, 20)], cache_dtype=cache_dtype)
        problem.check(problem.run())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_cache_in_8_bits(self, dtype: torch.dtype) -> None:
        if not tiles.narrow_floats(torch.device(DEVICE)):
            pytest.skip("this GPU has no 8-bit floats")
        narrow = torch.float8_e4m3fn
        problem = Problem([(1, 12), (50, 50), (3, 20), (1, 600)], dtype=dtype, cache_dtype=narrow)
        problem.check(problem.run())
        problem.k[0, 0, :3] = torch.tensor([1e4, -1e4, 448.0])
        batch = problem.build()
        write_kv(problem.k, problem.v, problem.cache, batch)
        written = problem.cache.clone()
        with dispatch.using("torch"):
            write_kv(problem.k, problem.v, problem.cache, batch)
        assert torch.equal(problem.cache.view(torch.uint8), written.view(torch.uint8))
        block, offset = divmod(int(problem.slots[0]), problem.block_size)
        assert written[block, 0, 0, offset, :3].tolist() == [448.0, -448.0, 448.0]

    def test_empty_steps_and_sequences_without_queries(self) -> None:
        empty = AttentionBatch.build([0], [], [0], [], [], block_size=16, device=DEVICE)
        problem = Problem([(2, 5), (1, 9)])
        write_kv(problem.k[:0], problem.v[:0], problem.cache, empty)
        assert paged_attention(problem.q[:0], problem.cache, empty, scale=1.0).shape == (0, 4, 32)
        assert not dispatch.launches
        starts, contexts, tables = problem.query_start, problem.context_len, problem.block_start
        batch = AttentionBatch.build(
            [*starts, starts[-1]], [*contexts, 7], [*tables, tables[-1] + 1], [*problem.blocks, 0],
            problem.slots, block_size=16, device=DEVICE,
        )  # fmt: skip
        problem.check(problem.run(batch))

    def test_what_triton_cannot_do(self) -> None:
        wide, double = Problem([(1, 3)], head_dim=320), Problem([(1, 3)], dtype=torch.float64)
        for problem, named in ((wide, "heads of 320"), (double, "float64")):
            with pytest.raises(dispatch.KernelUnavailableError, match=named):
                problem.run()
        with pytest.raises(ValueError, match="heads of 320"):
            fixed(wide)

    def test_a_batch_serves_both_implementations(self) -> None:
        problem = Problem([(1, 30), (9, 9), (4, 40)])
        batch = problem.build()
        found = problem.run(batch)
        with dispatch.using("torch"):
            torch.testing.assert_close(found, problem.run(batch), atol=1e-5, rtol=1e-5)
            other = problem.build()
        assert torch.equal(problem.attend(other), found)

    def test_named_layers_travel_in_one_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = Problem([(1, 900), (9, 9)])
        copies = count_copies(monkeypatch)
        batch = AttentionBatch.build(*problem.step, block_size=16, device=DEVICE, layers=[problem.shape])
        problem.check(problem.run(batch))
        assert len(copies) == 1
        problem.window = 5
        problem.check(problem.run(batch))
        problem.attend(batch)
        assert len(copies) == 2

    def test_buffers_of_fixed_size_serve_any_step(self) -> None:
        steps: list[Lengths] = [
            [(1, 5), (1, 33), (1, 17)],
            [(1, 1400)],
            [(1, 2), (2, 900), (1, 64), (2, 40)],
            [(6, 6)],
            [],
        ]
        problems = [Problem(lengths, window=w) for lengths in steps for w in (None, 50) if lengths]
        buffers = fixed(*problems[:2], max_tokens=6, max_sequences=4)
        grids = set()
        for problem in problems:
            batch = buffers.fill(*problem.step)
            plan = batch.tables.plan(problem.shape)
            grids.add((plan.num_tiles, plan.num_merges, plan.num_planes, plan.tile.data_ptr()))
            tokens = len(problem.q)
            padded = pad(problem, 6)
            assert not padded[tokens:].any()
            problem.check(padded[:tokens])
        assert len(grids) == 2, "one for each shape"
        empty = buffers.fill([0], [], [0], [], [])
        assert not problem.attend(empty).any()

    def test_buffers_refuse_what_does_not_fit(self) -> None:
        problem = Problem([(1, 5), (2, 33)])
        for capacity, named in (
            ({"max_tokens": 2}, "max_tokens"),
            ({"max_sequences": 1}, "max_sequences"),
            ({"max_blocks": 2}, "max_blocks"),
        ):
            with pytest.raises(ValueError, match=named):
                fixed(problem, **capacity).fill(*problem.step)
        batch = fixed(problem, max_tokens=3).fill(*problem.step)
        problem.window = 3
        with pytest.raises(ValueError, match="sliding_window=3"):
            problem.run(batch)
        with dispatch.using("torch"), pytest.raises(ValueError, match="torch"):
            fixed(problem)

    @needs_graphs
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_captured_graph_serves_other_steps(self, dtype: torch.dtype) -> None:
        """Captured on short contexts; replayed with long ones, fewer sequences, other tables."""
        shape: dict[str, Any] = {"heads": (8, 2), "head_dim": 128, "dtype": dtype}
        seen = Problem([(1, 40)] * 8, **shape)
        buffers = fixed(seen, max_tokens=8, max_sequences=8)
        cache = torch.full((700, *seen.cache.shape[1:]), math.nan, dtype=dtype, device=DEVICE)
        cache[: len(seen.cache)] = seen.cache
        seen.cache = cache
        batch = buffers.fill(*seen.step)
        seen.run(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = seen.run(batch)
        q, k, v = seen.q, seen.k, seen.v
        for seed, lengths in enumerate(
            ([(1, 40)] * 8, [(1, 3000), (1, 1), (1, 17)], [(1, 129), (4, 900)], [(1, 5000)])
        ):
            problem = Problem(lengths, **shape, seed=seed)
            tokens = len(problem.q)
            for target, source in ((q, problem.q), (k, problem.k), (v, problem.v)):
                target[:tokens] = source
            cache.fill_(math.nan)
            cache[: len(problem.cache)] = problem.cache
            buffers.fill(*problem.step)
            out.fill_(math.nan)
            graph.replay()
            problem.check(out[:tokens])
            assert not out[tokens:].any()

    @needs_graphs
    @pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
    @pytest.mark.parametrize("window", [None, 600])
    def test_sizes_of_real_models(self, head_dim: int, window: int | None) -> None:
        lengths = [*random_lengths(head_dim, 40, 1000), (1, 20000), (777, 777), (512, 4096)]
        for dtype in DTYPES:
            for softcap in (None, 30.0):
                problem = Problem(lengths, (32, 8), head_dim, dtype=dtype, window=window, softcap=softcap)
                problem.check(problem.run())


def fixed(*problems: Problem, **capacity: int) -> AttentionBuffers:
    """Buffers for the layers of `problems`; roomy, but for what is given."""
    sizes = {"max_tokens": 64, "max_sequences": 8, "max_blocks": 800, **capacity}
    shapes = [problem.shape for problem in problems]
    return AttentionBuffers(block_size=problems[0].block_size, layers=shapes, device=DEVICE, **sizes)


def pad(problem: Problem, tokens: int) -> torch.Tensor:
    """Run the problem with rows of NaN after its own, up to `tokens`."""
    more = tokens - len(problem.q)
    own = {name: getattr(problem, name) for name in ("q", "k", "v")}
    for name, rows in own.items():
        setattr(problem, name, F.pad(rows, (0, 0, 0, 0, 0, more), value=math.nan))
    buffers = fixed(problem, max_tokens=tokens, max_sequences=4)
    out = problem.run(buffers.fill(*problem.step))
    for name, rows in own.items():
        setattr(problem, name, rows)
    return out


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every copy of tables to the device."""
    copies: list[int] = []
    pack: Callable[..., Any] = packed.pack

    def counted(arrays: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
        copies.append(len(arrays))
        return pack(arrays, device)

    monkeypatch.setattr(packed, "pack", counted)
    return copies


def test_torch_builds_nothing_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = count_copies(monkeypatch)
    cache = torch.zeros(kv_cache_shape(4, 8, 2, 16))
    with dispatch.using("torch"):
        batch = AttentionBatch.build([0, 1, 5], [12, 9], [0, 2, 4], [3, 1, 0, 2], [3, 4, 5, 6, 7],
                                     block_size=8, device="cpu",
                                     layers=[LayerShape(2, 2, 16, torch.float32)])  # fmt: skip
        k = torch.randn(5, 2, 16)
        write_kv(k, k, cache, batch)
        paged_attention(k, cache, batch, scale=1.0)
    assert not copies


def test_plan_of_the_docstring() -> None:
    queries = Queries(*(np.array(pair) for pair in ((0, 1), (1, 3), (600, 3), (0, 38))))
    variant = AttentionTiles(rows=4, keys=64, warps=4, stages=1, phases=False)
    cut = planning.cut(queries, LayerShape(2, 1, 16, torch.float32), variant, programs=4)
    tile = cut.tile.tolist()
    written = re.findall(r"\[(-?\d+(?: -?\d+)+)\]", planning.__doc__ or "")
    assert [[int(number) for number in row.split()] for row in written] == [*tile, cut.merge[0, :5].tolist()]
    assert cut.num_planes == 3


@pytest.mark.parametrize("window", [None, 5, 300])
def test_plans_cover_every_key_once(window: int | None) -> None:
    rng = np.random.default_rng(window or 0)
    for _ in range(60):
        sequences = int(rng.integers(1, 20))
        context = rng.integers(1, int(rng.choice([20, 400, 3000])), sequences)
        query = np.minimum(np.where(rng.random(sequences) < 0.6, 1, rng.integers(0, 300, sequences)), context)
        table = np.cumsum(context) - context
        queries = Queries(np.cumsum(query) - query, query, context, table)
        group, kv_heads = int(rng.integers(1, 9)), int(rng.integers(1, 4))
        shape = LayerShape(group * kv_heads, kv_heads, 64, torch.bfloat16, window)
        programs = int(rng.choice([1, 16, 500]))
        variant = planning.choose_tiles(queries, shape, roomy=True)
        cut = planning.cut(queries, shape, variant, programs)
        rows = sum(int(end - first) for first, end in cut.tile[:, :2] if end > first)
        check_cover(queries, shape, variant, cut)
        assert rows >= int(query.sum()) * group
        capacity = planning.capacity(
            int(query.sum()) + int(rng.integers(0, 3)), sequences, shape, variant.rows, programs
        )
        for gain in (0, planning.DIVIDE_GAIN):
            cut = planning.cut(queries, shape, variant, programs, gain=gain)
            assert len(cut.tile) <= capacity.tiles
            assert len(cut.merge) <= capacity.merges
            assert cut.num_planes <= capacity.planes


def check_cover(queries: Queries, shape: LayerShape, variant: AttentionTiles, cut: planning.Cut) -> None:
    """Each row of each sequence meets each key it sees in exactly one tile, and planes are merged once."""
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    planes = []
    for first, end, token, table, position, begin, last, plane in cut.tile.tolist():
        owner = int(np.flatnonzero((queries.token == token) & (queries.query_len > 0))[0])
        assert 0 < end - first <= variant.rows
        assert table == queries.table[owner]
        assert position == queries.context_len[owner] - queries.query_len[owner]
        assert begin < last
        seen.setdefault((owner, first), []).append((begin, last))
        if plane >= 0:
            planes.append(plane)
            assert (last - begin) % variant.keys == 0 or last == position + (end - 1) // shape.group + 1
    for owner, query in enumerate(queries.query_len.tolist()):
        num_rows = query * shape.group
        tile_starts = range(0, num_rows, variant.rows)
        assert sorted(first for index, first in seen if index == owner) == list(tile_starts)
        for first in tile_starts:
            ranges = sorted(seen[owner, first])
            end_row = min(first + variant.rows, num_rows)
            start = int(queries.context_len[owner]) - query
            lowest = start + first // shape.group - (shape.sliding_window or 1 << 40) + 1
            assert ranges[0][0] == max(lowest, 0)
            assert ranges[-1][1] == start + (end_row - 1) // shape.group + 1
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert planes == list(range(cut.num_planes))
    merged = [plane for merge in cut.merge.tolist() for plane in range(merge[3], merge[4])]
    assert merged == planes
    for first, end, token, first_plane, end_plane, *_ in cut.merge.tolist():
        rows = cut.tile[np.isin(cut.tile[:, 7], range(first_plane, end_plane)), :3]
        assert len(rows) == end_plane - first_plane > 1
        assert (rows == (first, end, token)).all()
