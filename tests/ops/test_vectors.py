"""The vector ops against a float64 oracle that goes token by token; what has no vector keeps its bits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loraplex_kernels import vectors
from loraplex_kernels.pool import (
    EntryShape,
    LoraBatch,
    LoraPool,
    LoraSite,
    Run,
    VectorKind,
    VectorShape,
    adapter_layout,
    extent_alignment,
)

IN, SLICES, TOKENS = 24, ((0, 16), (16, 8)), 9
SITE = LoraSite(1, IN, SLICES)
# slot 0: scales its input and both outputs; 1: a bias on the second slice; 2: nothing; 3: a bias on both
SHAPES = {
    0: [
        VectorShape(1, VectorKind.INPUT_SCALE, IN),
        VectorShape(1, VectorKind.OUTPUT_SCALE, 16),
        VectorShape(2, VectorKind.OUTPUT_SCALE, 8),
    ],
    1: [VectorShape(2, VectorKind.BIAS, 8)],
    2: [],
    3: [VectorShape(1, VectorKind.BIAS, 16), VectorShape(2, VectorKind.BIAS, 8)],
}
RUNS: list[Run] = [
    (0, 2, ((0, 1.0),)),
    (3, 4, ((1, 0.5), (3, -2.0))),
    (4, 6, ((2, 1.0),)),
    (6, 8, ((3, 1.0),)),
]


def _pool(dtype: torch.dtype) -> tuple[LoraPool, dict[tuple[int, VectorKind, int], torch.Tensor]]:
    """Each slot with a rank-3 pair at entry 1 beside its vectors; the arena is NaN where nothing lies."""
    generator = torch.Generator().manual_seed(4)
    multiple = extent_alignment([IN, 16, 8])
    pool = LoraPool.allocate(
        num_elements=64 * multiple, num_slots=4, num_entries=3, dtype=dtype, device="cpu", max_rank=8
    )
    pool.arena.fill_(float("nan"))
    values, start = {}, multiple
    for slot, shapes in SHAPES.items():
        pair = EntryShape(1, IN, 16, 3)
        layout = adapter_layout([pair], multiple, shapes)
        spans = [(layout.a_offset[0], 8 * IN), (layout.b_offset[0], 8 * 16)]
        for shape, offset in zip(layout.vectors, layout.vector_offset, strict=True):
            value = torch.randn(shape.length, generator=generator).to(dtype)
            pool.arena[start + offset : start + offset + shape.length] = value
            values[slot, shape.kind, shape.entry] = value.double()
            spans.append((offset, shape.length))
        ordered = sorted(spans)
        assert all(one + size <= two for (one, size), (two, _) in pairwise(ordered))
        assert max(begin + size for begin, size in spans) <= layout.num_elements
        pool.bind(slot, start, layout)
        start += -(-layout.num_elements // multiple) * multiple
    return pool, values


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_each_op_equals_the_oracle(dtype: torch.dtype, tolerance: float) -> None:
    pool, values = _pool(dtype)
    batch = LoraBatch.build(RUNS)
    x, y = torch.randn(TOKENS + 2, IN).to(dtype), torch.randn(TOKENS + 2, 30).to(dtype)
    exact_x, exact_y, exact_sum = x.double(), y.double(), y.double()
    for start, end, adapters in RUNS:
        for slot, weight in adapters:
            rows = slice(start, end)
            for index, (column, width) in enumerate(SLICES):
                columns, entry = slice(column, column + width), SITE.first_entry + index
                if (slot, VectorKind.OUTPUT_SCALE, entry) in values:
                    exact_y[rows, columns] *= 1 + values[slot, VectorKind.OUTPUT_SCALE, entry]
                if (slot, VectorKind.BIAS, entry) in values:
                    exact_sum[rows, columns] += weight * values[slot, VectorKind.BIAS, entry]
            if (slot, VectorKind.INPUT_SCALE, 1) in values:
                exact_x[rows] *= 1 + values[slot, VectorKind.INPUT_SCALE, 1]

    before = x.clone()
    scaled = vectors.scale_input(x, pool, SITE, batch)
    assert torch.equal(x, before)
    summed, plain = y.clone(), y.clone()
    vectors.scale_output(y, pool, SITE, batch)
    vectors.add_bias(summed, pool, SITE, batch)
    for found, exact in ((scaled, exact_x), (y, exact_y), (summed, exact_sum)):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(y[2:], plain[2:])
    assert torch.equal(summed[[0, 1, 2, 4, 5, 8, 9, 10]], plain[[0, 1, 2, 4, 5, 8, 9, 10]])


def test_slots_without_vectors_cost_nothing() -> None:
    pool, _ = _pool(torch.float32)
    batch = LoraBatch.build([(0, 3, ((2, 1.0),))])
    assert not vectors.any_vectors(pool, batch)
    assert vectors.any_vectors(pool, LoraBatch.build(RUNS))
    x = torch.randn(3, IN)
    assert vectors.scale_input(x, pool, SITE, batch) is x


def test_a_slot_given_to_another_adapter_takes_its_vectors_along() -> None:
    pool, _ = _pool(torch.float32)
    batch = LoraBatch.build([(0, 3, ((0, 1.0),))])
    y = torch.ones(3, 24)
    vectors.scale_output(y, pool, SITE, batch)
    assert not torch.equal(y, torch.ones(3, 24))
    pool.clear(0)
    y = torch.ones(3, 24)
    vectors.scale_output(y, pool, SITE, batch)
    assert torch.equal(y, torch.ones(3, 24))


def test_misfits_are_named() -> None:
    pool, _ = _pool(torch.float32)
    batch = LoraBatch.build(RUNS)
    with pytest.raises(ValueError, match="y must be at least"):
        vectors.add_bias(torch.zeros(9, 20), pool, SITE, batch)
    with pytest.raises(ValueError, match="x must be at least"):
        vectors.scale_input(torch.zeros(4, IN), pool, SITE, batch)
    with pytest.raises(ValueError, match="must not repeat"):
        adapter_layout([], vectors=[SHAPES[1][0], SHAPES[1][0]])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_prefix_lies_as_its_file_does(scaled: bool) -> None:
    layers, heads, width, tokens = 3, 2, 4, 5
    rows = tokens * layers * 2
    values = torch.randn(rows, heads * width)
    shape = VectorShape(0, VectorKind.PREFIX, heads * width, rows)
    layout = adapter_layout([], vectors=[shape], scaled=scaled)
    pool = LoraPool.allocate(
        num_elements=4096, num_slots=2, num_entries=1, dtype=torch.float32, device="cpu", scaled=scaled
    )
    start = 2 * layout.alignment
    pool.bind(1, start, layout)
    begin = start + layout.vector_offset[0]
    size = values.numel() * (4 if scaled else 1)
    pool.arena[begin : begin + size].view(torch.float32)[:] = values.view(-1)
    found = vectors.prefix(pool, 1, range(1, 4), layers, heads, width)
    assert found.shape == (layers, 2, 3, heads, width)
    expected = values.view(tokens, layers, 2, heads, width)
    for layer in range(layers):
        assert torch.equal(found[layer, 0], expected[1:4, layer, 0])
        assert torch.equal(found[layer, 1], expected[1:4, layer, 1])
    with pytest.raises(ValueError, match="slot 0 has no prefix"):
        vectors.prefix(pool, 0, range(1), layers, heads, width)
