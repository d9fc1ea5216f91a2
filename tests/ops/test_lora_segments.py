"""The LoRA op's host side: where adapters lie in the arena, and a step's pairs, groups and tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loraplex_kernels.pool import (
    ALIGNMENT,
    DECODE_ROWS,
    PREFILL_ROWS,
    EntryShape,
    LoraBatch,
    LoraBatchBuffers,
    LoraPool,
    Run,
    adapter_layout,
    extent_alignment,
    segments,
)


def tile_tables(batch: LoraBatch) -> tuple[list[list[int]], list[list[int]]]:
    return batch.shrink_tile[: batch.shrink_tiles].tolist(), batch.expand_tile[: batch.expand_tiles].tolist()


def test_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "tile_rows", lambda num_pairs, num_segments: 2)
    buffers = LoraBatchBuffers(max_tokens=4, max_pairs=5)
    batch = buffers.fill([(0, 2, ((3, 1.0),)), (2, 3, ((1, 0.5), (3, 2.0))), (4, 5, ((3, 1.0),))])
    assert batch.num_tokens == 5
    assert batch.num_pairs == 5
    assert batch.pair_token.tolist() == [2, 0, 1, 4, 2]
    assert batch.pair_weight.tolist() == [0.5, 1, 1, 1, 2]
    assert batch.group_token.tolist() == [0, 1, 4, 2]
    shrink_tile, expand_tile = tile_tables(batch)
    assert shrink_tile == [[1, 0, 1], [3, 1, 3], [3, 3, 5]]
    assert expand_tile == [[0, 2, 0, 1], [2, 3, 0, 1], [3, 4, 1, 3]]
    assert batch.member[:3].tolist() == [[3, 1], [1, -3], [3, 1]]


def pairs_by_shrink_tile(batch: LoraBatch) -> list[tuple[int, int, float]]:
    found = []
    for slot, first, end in tile_tables(batch)[0]:
        assert end - first <= batch.tile_rows
        for pair in range(first, end):
            found.append((int(batch.pair_token[pair]), slot, float(batch.pair_weight[pair])))
    return found


def adapters_by_expand_tile(batch: LoraBatch) -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = {}
    slot_of_pair = {pair: slot for slot, first, end in tile_tables(batch)[0] for pair in range(first, end)}
    for first_row, end_row, first_member, end_member in tile_tables(batch)[1]:
        assert end_row - first_row <= batch.tile_rows
        for row in range(first_row, end_row):
            token = int(batch.group_token[row])
            assert token not in found, "a token lies in two tiles"
            found[token] = []
            for slot, shift in batch.member[first_member:end_member].tolist():
                assert slot_of_pair[row + shift] == slot
                assert int(batch.pair_token[row + shift]) == token
                found[token].append((slot, float(batch.pair_weight[row + shift])))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_pair_once_and_in_order(lora_case: Any, seed: int) -> None:
    tokens = [1, 5, 40, 257][seed % 4]
    runs = lora_case.random_runs(seed, tokens, 1 + 3 * seed, longest=1 + 5 * (seed % 5))
    batch = LoraBatch.build(runs)
    wanted = {
        token: [(slot, pytest.approx(weight)) for slot, weight in adapters]
        for start, end, adapters in runs
        for token in range(start, end)
        if adapters
    }
    assert adapters_by_expand_tile(batch) == wanted
    pairs = pairs_by_shrink_tile(batch)
    assert sorted(pair[:2] for pair in pairs) == sorted(
        (token, slot) for token, adapters in wanted.items() for slot, _ in adapters
    )
    assert [slot for _, slot, _ in pairs] == sorted(slot for _, slot, _ in pairs)
    assert batch.num_pairs == len(pairs)


def test_equal_compositions_share_tiles() -> None:
    runs: list[Run] = [(token, token + 1, ((token % 2, 1.0 + token),)) for token in range(16)]
    shrink_tile, expand_tile = tile_tables(LoraBatch.build(runs))
    assert shrink_tile == [[0, 0, 8], [1, 8, 16]]
    assert [tile[:2] for tile in expand_tile] == [[0, 8], [8, 16]]


def test_prefill_cuts_larger_tiles() -> None:
    assert LoraBatch.build([(0, 256, ((0, 1.0),))]).tile_rows == PREFILL_ROWS
    assert LoraBatch.build([(0, 32, ((0, 1.0),))]).tile_rows == DECODE_ROWS


def test_a_fixed_grid_holds_any_batch() -> None:
    buffers = LoraBatchBuffers(max_tokens=32, max_pairs=48, max_segments=16, fixed_grid=True)
    many = buffers.fill([(token, token + 1, ((token % 16, 1.0),)) for token in range(32)])
    grids = (many.shrink_tiles, many.expand_tiles, many.tile_rows, many.pair_rows)
    pointers = [many.pair_token.data_ptr(), many.shrink_tile.data_ptr(), many.expand_tile.data_ptr()]
    few_runs: list[Run] = [(3, 5, ((7, 1.0), (2, -1.0)))]
    few = buffers.fill(few_runs)
    assert (few.shrink_tiles, few.expand_tiles, few.tile_rows, few.pair_rows) == grids
    assert [few.pair_token.data_ptr(), few.shrink_tile.data_ptr(), few.expand_tile.data_ptr()] == pointers
    shrink_tile, expand_tile = tile_tables(few)
    assert shrink_tile[:2] == [[2, 0, 2], [7, 2, 4]]
    assert all(tile == [-1, 0, 0] for tile in shrink_tile[2:])
    assert expand_tile[0] == [0, 2, 0, 2]
    assert all(first == end for first, end, _, _ in expand_tile[1:])
    none = buffers.fill([])
    assert none.num_pairs == 0
    assert all(slot == -1 for slot, _, _ in tile_tables(none)[0])
    one_for_all = buffers.fill([(0, 32, ((0, 1.0),))])
    assert sorted(adapters_by_expand_tile(one_for_all)) == list(range(32))


def test_the_same_runs_are_not_built_again() -> None:
    buffers = LoraBatchBuffers(max_tokens=4, max_pairs=4)
    runs: list[Run] = [(0, 2, ((0, 1.0),))]
    first = buffers.fill(runs)
    assert buffers.fill([(0, 2, ((0, 1.0),))]) is first
    runs.append((2, 3, ((1, 1.0),)))
    second = buffers.fill(runs)
    assert second is not first
    assert second.num_pairs == 3


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 4, ((0, 1.0),)), (3, 5, ((1, 1.0),))], "ascending, disjoint"),
        ([(4, 4, ((0, 1.0),))], "not empty"),
        ([(0, 4, ((0, 1.0), (0, 0.5)))], "named once"),
        ([(0, 4, ((-1, 1.0),))], "not be negative"),
        ([(0, 9, ((0, 1.0),))], "max_tokens of at least 9"),
        ([(0, 6, ((0, 1.0), (1, 1.0)))], "max_pairs of at least 12"),
        ([(0, 1, ((0, 1.0), (1, 1.0), (2, 1.0)))], "max_segments of at least 3"),
    ],
)
def test_bad_runs_are_refused_and_leave_the_buffers_usable(runs: list[Run], message: str) -> None:
    buffers = LoraBatchBuffers(max_tokens=8, max_pairs=8, max_segments=2)
    with pytest.raises(ValueError, match=message):
        buffers.fill(runs)
    assert buffers.fill([(0, 8, ((0, 1.0),))]).num_pairs == 8


ENTRIES = [
    EntryShape(0, 96, 96, 6),
    EntryShape(1, 96, 32, 13),
    EntryShape(2, 96, 40, 0),
    EntryShape(5, 256, 96, 8),
]


def test_blocks_are_whole_rows_and_do_not_overlap() -> None:
    layout = adapter_layout(ENTRIES)
    assert [shape.entry for shape in layout.entries] == [0, 1, 5]
    taken = np.zeros(layout.num_elements, np.int64)
    for shape, a_offset, b_offset in zip(layout.entries, layout.a_offset, layout.b_offset, strict=True):
        for offset, row_length in ((a_offset, shape.in_features), (b_offset, shape.width)):
            assert offset % row_length == 0
            assert offset % ALIGNMENT == 0
            taken[offset : offset + shape.rank_padded * row_length] += 1
    assert taken.max() == 1
    assert np.count_nonzero(taken == 0) < 256 + 96 + 32 + ALIGNMENT
    assert layout.alignment == extent_alignment([96, 32, 256])


def test_a_rank_costs_its_own_rows() -> None:
    sizes = [adapter_layout([EntryShape(0, 64, 64, rank)]).num_elements for rank in (1, 6, 8, 9, 512)]
    assert sizes == [8 * 128, 8 * 128, 8 * 128, 16 * 128, 512 * 128]
    assert adapter_layout([EntryShape(0, 64, 64, 0)]).num_elements == 0


def test_awkward_widths_give_up_whole_rows() -> None:
    assert extent_alignment([601, 257, 263]) == ALIGNMENT
    layout = adapter_layout([EntryShape(0, 601, 257, 3), EntryShape(1, 601, 263, 3)])
    assert layout.alignment == ALIGNMENT
    assert all(offset % ALIGNMENT == 0 for offset in layout.a_offset + layout.b_offset)
    # One alignment serves the model: an adapter that could do better follows it.
    assert adapter_layout([EntryShape(0, 64, 96, 3)], 16).alignment == 16
    assert adapter_layout([EntryShape(0, 64, 96, 3)], 960).alignment == 960


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([EntryShape(0, 64, 64, 513)], "rank of entry 0 must be 0 to 512, got 513"),
        ([EntryShape(0, 64, 64, 4), EntryShape(0, 64, 64, 4)], "repeat"),
        ([EntryShape(3, 64, 0, 4)], "entry 3 has an empty shape"),
    ],
)
def test_bad_entries_are_refused(entries: list[EntryShape], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_layout(entries)


def test_slots_are_bound_and_cleared() -> None:
    pool = LoraPool.allocate(
        num_elements=1 << 16, num_slots=2, num_entries=6, dtype=torch.float32, device="cpu", max_rank=16
    )
    layout = adapter_layout(ENTRIES)
    start = 2 * layout.alignment
    pool.bind(1, start, layout)
    assert pool.rank[1].tolist() == [6, 13, 0, 0, 0, 8]
    assert int(pool.a_offset[1, 5]) == start + layout.a_offset[2]
    pool.arena[int(pool.b_offset[1, 1])] = 7
    assert pool.b(1, 1, 32)[0, 0] == 7
    assert pool.b(1, 1, 32).shape == (13, 32)
    version = pool.host.version
    pool.clear(1)
    assert pool.rank[1].tolist() == [0] * 6
    assert pool.host.version > version

    too_large = adapter_layout([EntryShape(0, 64, 64, 17)])
    outside = adapter_layout([EntryShape(6, 64, 64, 4)])
    for wrong, at, message in (
        (layout, start + 1, "no multiple of"),
        (layout, (1 << 16) // layout.alignment * layout.alignment, "leaves the arena"),
        (too_large, 0, "max_rank of 16"),
        (outside, 0, "outside the 6 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.bind(0, at, wrong)
    assert pool.rank[0].tolist() == [0] * 6
