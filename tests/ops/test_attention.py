"""Paged ragged attention against a float64 loop that sees the history itself, never the cache or its
layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from loraplex_kernels.attention import AttentionBatch, kv_cache_shape, paged_attention, write_kv
from loraplex_kernels.attention.groups import DECODE_SPLIT_GAIN, split

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    """A step over a paged cache, and the history it was filled from."""

    q: torch.Tensor
    """[T, Hq, D]"""
    k: torch.Tensor
    """[T, Hkv, D]: the step's own keys."""
    v: torch.Tensor
    cache: torch.Tensor
    batch: AttentionBatch
    histories: list[tuple[torch.Tensor, torch.Tensor]]
    """Per sequence: all keys and values [context_len, Hkv, D]."""
    lengths: list[tuple[int, int]]
    """Per sequence: (query_len, context_len)."""


def make_case(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 16,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    poison: float | None = math.nan,
    window: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Shuffle the blocks of all sequences over a cache whose other cells hold `poison`.

    The cells of this step's tokens hold it too, until `write_kv`, and so do the cells that a sliding window
    has left behind: their blocks may have been given away.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_blocks = [-(-context // block_size) + int(rng.integers(0, 3)) for _, context in lengths]
    total = sum(num_blocks) + 5
    ids = rng.permutation(total)[: sum(num_blocks)]
    tables = np.split(ids, np.cumsum(num_blocks)[:-1])
    cache = torch.empty(kv_cache_shape(total, block_size, num_kv_heads, head_dim), dtype=dtype)
    if poison is None:
        cache.normal_(generator=torch.Generator().manual_seed(seed + 1))
    else:
        cache.fill_(poison)

    histories, slots, own_k, own_v = [], [], [], []
    for (query_len, context), table in zip(lengths, tables, strict=True):
        keys, values = (
            torch.randn(context, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2)
        )
        first = context - query_len
        for position in range(0 if window is None else max(0, first - window + 1), first):
            block, offset = table[position // block_size], position % block_size
            cache[block, 0, :, offset] = keys[position]
            cache[block, 1, :, offset] = values[position]
        positions = np.arange(first, context)
        slots.append(table[positions // block_size] * block_size + positions % block_size)
        histories.append((keys, values))
        own_k.append(keys[first:])
        own_v.append(values[first:])
    batch = AttentionBatch.build(
        np.cumsum([0, *(query for query, _ in lengths)], dtype=np.int32),
        np.array([context for _, context in lengths], dtype=np.int32),
        np.cumsum([0, *num_blocks], dtype=np.int32),
        ids.astype(np.int32),
        np.concatenate(slots),
        block_size=block_size,
        device=device,
    )
    tokens = sum(query for query, _ in lengths)
    q = torch.randn(tokens, num_heads, head_dim, generator=generator).to(dtype)
    tensors = (tensor.to(device) for tensor in (q, torch.cat(own_k), torch.cat(own_v), cache))
    return Case(*tensors, batch, histories, lengths)


def oracle(case: Case, scale: float, window: int | None, softcap: float | None) -> torch.Tensor:
    """One query and one head at a time, in float64."""
    queries = case.q.cpu().double()
    out = torch.zeros_like(queries)
    per_kv_head = case.q.shape[1] // case.k.shape[1]
    row = 0
    for (query_len, context), (keys, values) in zip(case.lengths, case.histories, strict=True):
        for position in range(context - query_len, context):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(case.q.shape[1]):
                visible = keys[first : position + 1, head // per_kv_head].double()
                logits = visible @ queries[row, head] * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = torch.softmax(logits, 0)
                out[row, head] = weights @ values[first : position + 1, head // per_kv_head].double()
            row += 1
    return out


def attend(
    case: Case, *, window: int | None = None, softcap: float | None = None, own: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op; return its result and the oracle's, both float64."""
    scale = case.q.shape[2] ** -0.5 * 1.7
    write_kv(case.k, case.v, case.cache, case.batch)
    given = {"k": case.k, "v": case.v} if own else {}
    out = paged_attention(
        case.q, case.cache, case.batch, scale=scale, sliding_window=window, softcap=softcap, **given
    )
    assert out.dtype == case.q.dtype
    assert out.shape == case.q.shape
    return out.cpu().double(), oracle(case, scale, window, softcap)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random_lengths(rng: np.random.Generator, sequences: int) -> list[tuple[int, int]]:
    """Decodes, whole prompts and chunks of prompts in any order."""
    lengths = []
    for kind in rng.integers(0, 4, sequences):
        context = int(rng.integers(1, 60))
        query = {0: 1, 1: 1, 2: context}.get(int(kind), int(rng.integers(1, context + 1)))
        lengths.append((query, context))
    return lengths


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("window", [None, 1, 7, 20])
@pytest.mark.parametrize("sequences", [1, 2, 9, 33])
def test_random_ragged_batches(
    sequences: int, window: int | None, softcap: float | None, device: str
) -> None:
    seed = sequences * 100 + (window or 0)
    lengths = random_lengths(np.random.default_rng(seed), sequences)
    case = make_case(lengths, seed=seed, window=window, device=device)
    assert_close(*attend(case, window=window, softcap=softcap, own=bool(seed % 2)), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((4, 4), 16), ((6, 2), 32), ((8, 1), 64), ((2, 1), 256), ((3, 1), 24)]
)
def test_heads_and_dtypes(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: str) -> None:
    lengths = [(1, 9), (5, 5), (1, 30), (4, 17), (1, 1), (7, 7), (5, 5)]
    case = make_case(lengths, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
    assert_close(*attend(case), dtype)
    assert_close(*attend(case, window=6, softcap=2.0), dtype)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("query", ["decode", "whole", "chunk"])
def test_page_edges(block_size: int, query: str) -> None:
    contexts = [max(1, blocks * block_size + step) for blocks in (1, 2, 3) for step in (-1, 0, 1)]
    queries = [{"decode": 1, "whole": context, "chunk": (context + 1) // 2}[query] for context in contexts]
    case = make_case(list(zip(queries, contexts, strict=True)), block_size=block_size)
    for window in (None, block_size, block_size + 1):
        assert_close(*attend(case, window=window), torch.float32)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([(1, 40)] * 8, id="decodes"),
        pytest.param([(16, 16)] * 4, id="equal prompts"),
        pytest.param([(1, 33), (1, 20), (40, 50), (1, 7)], id="mixed"),
        pytest.param([(3, 3), (1, 1), (2, 9)], id="short"),
    ],
)
def test_layers_share_a_batch(lengths: list[tuple[int, int]]) -> None:
    """Windows, caps and head counts may alternate over the layers of one step (as in Gemma)."""
    first, second = make_case(lengths, seed=1), make_case(lengths, seed=1, heads=(4, 4), head_dim=32)
    for window, softcap in ((None, None), (5, None), (None, 2.0), (5, 2.0), (None, None)):
        assert_close(*attend(first, window=window, softcap=softcap), torch.float32)
        scale, k, v = 0.3, second.k, second.v
        write_kv(k, v, second.cache, first.batch)
        got = paged_attention(
            second.q, second.cache, first.batch, scale=scale, sliding_window=window, softcap=softcap
        )
        assert_close(got.double(), oracle(second, scale, window, softcap), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own", [False, True], ids=["from cache", "own keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
def test_other_cells_cannot_leak(
    dtype: torch.dtype, window: int | None, softcap: float | None, own: bool, device: str
) -> None:
    """NaN, Inf and large finite values in every cell that is not visible change no bit of the result."""
    lengths = [(1, 17), (20, 20), (1, 3), (6, 31), (12, 12), (20, 20), (1, 64), (9, 25)]
    results = []
    for poison in (math.nan, math.inf, -math.inf, 1e30, None):
        case = make_case(lengths, dtype=dtype, poison=poison, window=window, device=device)
        got, want = attend(case, window=window, softcap=softcap, own=own)
        assert_close(got, want, dtype)
        results.append(got)
    for other in results[1:]:
        assert torch.equal(results[0], other)


def tables(batch: AttentionBatch) -> list[np.ndarray]:
    return [
        batch.blocks[first:last]
        for first, last in zip(batch.block_start[:-1], batch.block_start[1:], strict=True)
    ]


def slots(case: Case) -> np.ndarray:
    """The slot of each of the step's tokens."""
    found = []
    for (query, context), table in zip(case.lengths, tables(case.batch), strict=True):
        positions = np.arange(context - query, context)
        found.append(table[positions // 8] * 8 + positions % 8)
    return np.concatenate(found)


def test_row_does_not_depend_on_its_neighbours() -> None:
    lengths = [(1, 21), (1, 50), (13, 13), (6, 40), (1, 5)]
    together, want = attend(make_case(lengths, seed=3))
    lone = make_case(lengths, seed=3)
    write_kv(lone.k, lone.v, lone.cache, lone.batch)
    row = 0
    for index, (query, context) in enumerate(lengths):
        batch = AttentionBatch.build(
            [0, query], [context], [0, len(tables(lone.batch)[index])], tables(lone.batch)[index],
            np.zeros(query, np.int64), block_size=8, device="cpu",
        )  # fmt: skip
        alone = paged_attention(lone.q[row : row + query], lone.cache, batch, scale=16**-0.5 * 1.7)
        assert_close(alone.double(), together[row : row + query], torch.float32)
        row += query
    assert_close(together, want, torch.float32)


def test_write_kv_touches_only_its_cells() -> None:
    case = make_case([(1, 12), (5, 5), (3, 20)], poison=7.0)
    before = case.cache.clone()
    write_kv(case.k, case.v, case.cache, case.batch)
    written = torch.zeros(case.cache.shape[:4], dtype=torch.bool)
    row = 0
    for (query, context), table in zip(case.lengths, tables(case.batch), strict=True):
        for position in range(context - query, context):
            block, offset = int(table[position // 8]), position % 8
            assert torch.equal(case.cache[block, 0, :, offset], case.k[row])
            assert torch.equal(case.cache[block, 1, :, offset], case.v[row])
            written[block, :, :, offset] = True
            row += 1
    assert torch.equal(case.cache[~written], before[~written])


def test_write_kv_casts_to_the_cache() -> None:
    case = make_case([(2, 2)], dtype=torch.bfloat16)
    k = torch.randn(case.k.shape)
    write_kv(k, case.v, case.cache, case.batch)
    table = tables(case.batch)[0]
    assert torch.equal(case.cache[int(table[0]), 0, :, :2].transpose(0, 1), k.bfloat16())


def test_transposed_inputs() -> None:
    """Modelling code hands over [Hq, T, D] seen as [T, Hq, D]."""
    case = make_case([(1, 12), (5, 5), (5, 5), (3, 20)])
    loose = Case(
        *(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (case.q, case.k, case.v)),
        case.cache,
        case.batch,
        case.histories,
        case.lengths,
    )
    assert not loose.q.is_contiguous()
    assert_close(*attend(loose, own=True), torch.float32)


def test_sequences_without_queries_and_empty_steps() -> None:
    case = make_case([(1, 12), (4, 9)])
    blocks, starts = case.batch.blocks, case.batch.block_start
    batch = AttentionBatch.build(
        [0, 1, 1, 5], [12, 3, 9], [0, starts[1], starts[1] + 1, starts[2] + 1],
        np.insert(blocks, starts[1], blocks[0]), slots(case), block_size=8, device="cpu",
    )  # fmt: skip
    write_kv(case.k, case.v, case.cache, batch)
    got = paged_attention(case.q, case.cache, batch, scale=0.25)
    assert_close(got.double(), oracle(case, 0.25, None, None), torch.float32)
    empty = AttentionBatch.build([0], [], [0], [], [], block_size=8, device="cpu")
    nothing = torch.empty(0, 2, 16)
    write_kv(nothing, nothing, case.cache, empty)
    assert paged_attention(torch.empty(0, 6, 16), case.cache, empty, scale=1.0).shape == (0, 6, 16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 0}, "block_size"),
        ({"query_start": [0, 1, 4]}, "query_start"),
        ({"query_start": [0, 6, 5]}, "context_len"),
        ({"context_len": [12]}, "context_len"),
        ({"context_len": [12, 3]}, "context_len"),
        ({"context_len": [12, 17]}, "block_start"),
        ({"blocks": [3, 1, 0]}, "block_start"),
        ({"blocks": [3, -1, 0, 2]}, "blocks"),
        ({"slot_mapping": [0, 1, 2, 3, -1]}, "slot_mapping"),
    ],
)
def test_bad_metadata_is_refused(change: dict[str, object], named: str) -> None:
    arrays: dict[str, object] = {
        "query_start": [0, 1, 5], "context_len": [12, 9], "block_start": [0, 2, 4], "blocks": [3, 1, 0, 2],
        "slot_mapping": [0, 1, 2, 3, 4], "block_size": 8, "device": "cpu",
    }  # fmt: skip
    AttentionBatch.build(**arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        AttentionBatch.build(**{**arrays, **change})  # type: ignore[arg-type]


def test_bad_tensors_are_refused() -> None:
    case = make_case([(1, 12), (4, 9)])
    q, cache, batch = case.q, case.cache, case.batch
    with pytest.raises(ValueError, match="kv_cache"):
        paged_attention(q, cache.transpose(2, 3), batch, scale=1.0)
    with pytest.raises(ValueError, match="kv_cache"):
        paged_attention(q, cache[: batch.min_blocks - 1], batch, scale=1.0)
    with pytest.raises(ValueError, match="q "):
        paged_attention(q[1:], cache, batch, scale=1.0)
    with pytest.raises(ValueError, match="q "):
        paged_attention(q[:, :5], cache, batch, scale=1.0)
    with pytest.raises(ValueError, match="sliding_window"):
        paged_attention(q, cache, batch, scale=1.0, sliding_window=0)
    with pytest.raises(ValueError, match="softcap"):
        paged_attention(q, cache, batch, scale=1.0, softcap=0.0)
    with pytest.raises(ValueError, match="k "):
        write_kv(case.k[1:], case.v, cache, batch)


def test_split_bounds_the_padding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        number = int(rng.integers(1, 200))
        keys = rng.integers(1, 4000, number)
        queries = np.ones(number, np.int64)
        parts = split(np.arange(number), queries, keys, DECODE_SPLIT_GAIN)
        assert sorted(np.concatenate(parts).tolist()) == list(range(number))
        for part in parts:
            assert (np.diff(part) > 0).all()
            padding = part.size * keys[part].max() - keys[part].sum()
            assert padding <= DECODE_SPLIT_GAIN * (1 + math.log(part.size))
    assert len(split(np.arange(32), np.ones(32, np.int64), np.full(32, 96), DECODE_SPLIT_GAIN)) == 1
