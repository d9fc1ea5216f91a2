"""The ops at the two ends of the vocabulary, and those of own weights, against oracles in float64 that go
token by token; tokens without an adapter that acts there keep their bits.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from loraplex_kernels import replacement, vocabulary
from loraplex_kernels.pool import (
    ALIGNMENT,
    AdapterLayout,
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

TOKENS, HIDDEN, TABLE = 50, 24, 8
EMBEDDING = LoraSite(0, TOKENS, ((0, HIDDEN),))
HEAD = LoraSite(1, HIDDEN, ((0, TOKENS),))
LINEAR = LoraSite(2, HIDDEN, ((0, 16), (16, 8)))
RUNS: list[Run] = [
    (0, 3, ((0, 1.0),)),
    (3, 5, ((1, 0.5), (2, -2.0))),
    (6, 9, ((3, 1.0),)),
    (9, 10, ((2, 1.5),)),
]
ROWS = 12
SPREAD, WHOLE = (2, 7, 8, 30, 50, 51), tuple(range(50))


class Adapters:
    """Slot 0: scattered rows and added tokens at both ends; 1 and 2: pairs at the ends; 3: whole tables, and
    a weight with a bias for the second slice of the projection.
    """

    def __init__(self, dtype: torch.dtype, *, scaled: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.held: dict[tuple[int, VectorKind, int], torch.Tensor] = {}
        self.pairs: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.pool = LoraPool.allocate(
            num_elements=1 << 17, num_slots=4, num_entries=4, dtype=dtype, device="cpu", scaled=scaled
        )
        self.pool.arena.fill_(0 if scaled else float("nan"))
        start = 0
        for slot, pairs, vectors in (
            (0, [], [self._rows(0, SPREAD), self._rows(1, SPREAD)]),
            (1, [(0, TOKENS, HIDDEN, 5), (1, HIDDEN, TOKENS, 3)], []),
            (2, [(0, TOKENS, HIDDEN, 9)], []),
            (
                3,
                [],
                [
                    self._rows(0, WHOLE),
                    self._rows(1, WHOLE),
                    VectorShape(3, VectorKind.WEIGHT, HIDDEN, 8),
                    VectorShape(3, VectorKind.WEIGHT_BIAS, 8),
                ],
            ),
        ):
            shapes = [EntryShape(*pair) for pair in pairs]
            layout = adapter_layout(shapes, ALIGNMENT, vectors, scaled=scaled)
            blob = torch.zeros(layout.num_elements, dtype=self.pool.arena.dtype)
            for vector, offset in zip(layout.vectors, layout.vector_offset, strict=True):
                value = torch.randn(vector.rows, vector.length, generator=generator).to(dtype)
                self.held[slot, vector.kind, vector.entry] = value.double()
                if scaled:
                    raw = value.float().reshape(-1).view(torch.int8)
                    blob[offset : offset + len(raw)] = raw
                else:
                    blob[offset : offset + value.numel()] = value.reshape(-1)
            for index, shape in enumerate(layout.entries):
                self._put(blob, layout, index, shape, slot, generator)
            self.pool.arena[start : start + len(blob)] = blob
            self.pool.bind(slot, start, layout)
            start += len(blob)

    @staticmethod
    def _rows(entry: int, tokens: tuple[int, ...]) -> VectorShape:
        return VectorShape(entry, VectorKind.TOKEN_ROWS, HIDDEN, len(tokens), tokens)

    def _put(
        self,
        blob: torch.Tensor,
        layout: AdapterLayout,
        index: int,
        shape: EntryShape,
        slot: int,
        generator: torch.Generator,
    ) -> None:
        a = torch.randn(shape.rank, shape.in_features, generator=generator)
        b = torch.randn(shape.rank, shape.width, generator=generator)
        scale = torch.ones(shape.rank)
        if layout.scale_offset:
            a, b = ((value * 40).round().clamp(-127, 127) for value in (a, b))
            scale = torch.rand(shape.rank, generator=generator) / 1600
            raw = scale.view(torch.int8)
            blob[layout.scale_offset[index] : layout.scale_offset[index] + len(raw)] = raw
        for values, offset in ((a, layout.a_offset[index]), (b, layout.b_offset[index])):
            blob[offset : offset + values.numel()] = values.reshape(-1).to(blob.dtype)
        held = a.to(blob.dtype).double(), b.to(blob.dtype).double() * scale.double()[:, None]
        self.pairs[slot, shape.entry] = held

    def row(self, slot: int, entry: int, token: int) -> torch.Tensor | None:
        tokens = {0: SPREAD, 3: WHOLE}.get(slot, ())
        if token not in tokens:
            return None
        return self.held[slot, VectorKind.TOKEN_ROWS, entry][tokens.index(token)]


CASES = [
    (torch.float32, False, 1e-5),
    (torch.float32, True, 1e-5),
    (torch.bfloat16, False, 2e-2),
    (torch.float16, False, 3e-3),
]


@pytest.mark.parametrize(("dtype", "scaled", "tolerance"), CASES)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_embeddings(dtype: torch.dtype, scaled: bool, tolerance: float, scale: float) -> None:
    adapters = Adapters(dtype, scaled=scaled)
    pool, batch = adapters.pool, LoraBatch.build(RUNS)
    ids = torch.tensor([7, 51, 9, 0, 49, 3, 49, 50, 7, 11, 5, 6])
    x = torch.randn(ROWS, HIDDEN).to(dtype)
    before, exact = x.clone(), x.double()
    for start, end, members in RUNS:
        for token in range(start, end):
            wanted = int(ids[token])
            for slot, weight in members:
                own = adapters.row(slot, 0, wanted)
                if own is not None:
                    exact[token] = scale * own
                if (slot, 0) in adapters.pairs and wanted < TOKENS:
                    a, b = adapters.pairs[slot, 0]
                    exact[token] += scale * weight * (a[:, wanted] @ b)
    vocabulary.place_rows(x, ids, pool, EMBEDDING, batch, scale)
    vocabulary.add_low_rank(x, ids, pool, EMBEDDING, batch, scale)
    torch.testing.assert_close(x.double(), exact, rtol=tolerance, atol=tolerance * scale)
    untouched = [2, 5, 7, 10, 11]
    assert torch.equal(x[untouched], before[untouched])


@pytest.mark.parametrize(("dtype", "scaled", "tolerance"), CASES)
def test_logits(dtype: torch.dtype, scaled: bool, tolerance: float) -> None:
    adapters = Adapters(dtype, scaled=scaled)
    x, y = torch.randn(ROWS, HIDDEN).to(dtype), torch.randn(ROWS, TOKENS + 2).to(dtype)
    exact = y.double()
    for start, end, members in RUNS:
        for slot, _ in members:
            for token in range(TOKENS + 2):
                own = adapters.row(slot, 1, token)
                if own is not None:
                    exact[start:end, token] = x[start:end].double() @ own
    vocabulary.replace_logits(x, y, adapters.pool, HEAD, LoraBatch.build(RUNS))
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=10 * tolerance)
    with pytest.raises(ValueError, match="a row for token 51"):
        vocabulary.replace_logits(x, y[:, :-1], adapters.pool, HEAD, LoraBatch.build(RUNS))


@pytest.mark.parametrize(("dtype", "scaled", "tolerance"), CASES)
def test_own_weights(dtype: torch.dtype, scaled: bool, tolerance: float) -> None:
    adapters = Adapters(dtype, scaled=scaled)
    batch = LoraBatch.build(RUNS)
    assert replacement.any_weights(adapters.pool, batch)
    assert not replacement.any_weights(adapters.pool, LoraBatch.build(RUNS[:2]))
    x, y = torch.randn(ROWS, HIDDEN).to(dtype), torch.randn(ROWS, 26).to(dtype)
    exact = y.double()
    weight = adapters.held[3, VectorKind.WEIGHT, 3]
    bias = adapters.held[3, VectorKind.WEIGHT_BIAS, 3]
    exact[6:9, 16:24] = x[6:9].double() @ weight.T + bias
    replacement.linear(x, y, adapters.pool, LINEAR, batch)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=10 * tolerance)
    with pytest.raises(ValueError, match="y must be at least"):
        replacement.linear(x, y[:, :20], adapters.pool, LINEAR, batch)


def test_who_acts_where() -> None:
    pool = Adapters(torch.float32).pool
    acts = [
        [vocabulary.acts_at(pool, LoraBatch.build([(0, 1, ((slot, 1.0),))]), entry) for entry in (0, 1)]
        for slot in range(4)
    ]
    assert acts == [[True, True], [True, True], [True, False], [True, True]]
    added = vocabulary.added_tokens(pool, LoraBatch.build(RUNS), 1, TOKENS)
    assert added.tolist() == [2, 2, 2, *[0] * 7]
    pool.clear(0)
    assert not vocabulary.acts_at(pool, LoraBatch.build([(0, 1, ((0, 1.0),))]), 0)
    assert (0, 0) not in pool.host.tokens


def test_a_token_that_nobody_has_is_an_error() -> None:
    adapters = Adapters(torch.float32)
    x, ids = torch.zeros(ROWS, HIDDEN), np.zeros(ROWS, np.int64)
    for row in (4, 5, 7, 11):
        wrong = ids.copy()
        wrong[row] = TOKENS
        with pytest.raises(ValueError, match="token id 50 is outside the vocabulary"):
            vocabulary.check_ids(wrong, adapters.pool, EMBEDDING, LoraBatch.build(RUNS))
    with pytest.raises(ValueError, match="x must be"):
        vocabulary.place_rows(
            x[1:], torch.from_numpy(ids), adapters.pool, EMBEDDING, LoraBatch.build(RUNS), 1.0
        )


@pytest.mark.parametrize("tokens", [(), (3,), (3, 3), (5, 3), (-1, 3)])
def test_rows_need_ascending_tokens(tokens: tuple[int, ...]) -> None:
    vector = VectorShape(0, VectorKind.TOKEN_ROWS, HIDDEN, 2, tokens)
    with pytest.raises(ValueError, match="ascending tokens"):
        adapter_layout([], vectors=[vector])


def test_a_vocabulary_costs_no_alignment() -> None:
    """Rows of projections lie whole though one pair's are as long as an odd vocabulary."""
    multiple = extent_alignment([64, 96])
    shapes = [EntryShape(0, 50_257, 64, 4), EntryShape(1, 64, 96, 4)]
    layout = adapter_layout(shapes, multiple)
    assert layout.alignment == multiple
    assert layout.b_offset[0] % 64 == layout.a_offset[1] % 64 == layout.b_offset[1] % 96 == 0
    spans = sorted(
        (offset, 8 * length)
        for shape, a, b in zip(layout.entries, layout.a_offset, layout.b_offset, strict=True)
        for offset, length in ((a, shape.in_features), (b, shape.width))
    )
    assert all(one + size <= two for (one, size), (two, _) in pairwise(spans))
