from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.adapters.residency.arena import Arena


def test_best_fit_takes_the_smallest_gap_and_gaps_are_joined() -> None:
    arena = Arena(100, 10)
    starts = [arena.allocate(size) for size in (20, 10, 30, 10, 10)]
    assert starts == [0, 20, 30, 60, 70]
    arena.free(30)
    arena.free(0)
    assert arena.allocate(15) == 0, "20 at 0, 30 at 30 and 20 at 80 are free; 20 at 0 comes first"
    assert arena.allocate(20) == 80
    assert arena.allocate(40) is None
    arena.free(20)
    assert arena.allocate(40) == 20, "the gaps at 20 and 30 are one"
    assert arena.check_integrity() == []


def test_compaction_closes_gaps_around_what_cannot_move() -> None:
    arena = Arena(100)
    for size in (10, 20, 30, 40):
        arena.allocate(size)
    arena.free(0)
    arena.free(30)
    moves = arena.compact(immovable=[60])
    assert [(move.source, move.target, move.size) for move in moves] == [(10, 0, 20)]
    assert arena.extents == {0: 20, 60: 40}
    assert arena.allocate(40) == 20
    assert arena.check_integrity() == []


@pytest.mark.parametrize("size", [0, -1])
def test_empty_extents_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Arena(10).allocate(size)


def test_an_arena_may_be_too_small_for_anything() -> None:
    arena = Arena(7, 8)
    assert (arena.capacity, arena.allocate(1), arena.check_integrity()) == (0, None, [])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), alignment=st.sampled_from([1, 8, 48]), capacity=st.integers(0, 2000))
def test_random_use_keeps_extents_apart_and_their_bytes(seed: int, alignment: int, capacity: int) -> None:
    rng = random.Random(seed)
    arena = Arena(capacity, alignment)
    memory = [0] * arena.capacity
    content: dict[int, tuple[int, int]] = {}
    for stamp in range(1, 80):
        action = rng.random()
        if action < 0.5:
            size = rng.randint(1, 300)
            start = arena.allocate(size)
            if start is None:
                largest = max((gap for _, gap in _gaps(arena)), default=0)
                assert largest < arena.padded(size), "a gap that is large enough was not found"
            else:
                memory[start : start + size] = [stamp] * size
                content[start] = (size, stamp)
        elif action < 0.8 and content:
            start = rng.choice(sorted(content))
            arena.free(start)
            del content[start]
        else:
            fixed = [start for start in content if rng.random() < 0.2]
            moves = arena.compact(fixed)
            moved = {move.source: move.target for move in moves}
            assert not set(moved) & set(fixed)
            for move in moves:
                assert move.target < move.source
                memory[move.target : move.target + move.size] = memory[move.source : move.source + move.size]
            content = {moved.get(start, start): value for start, value in content.items()}
            if not fixed:
                assert len(_gaps(arena)) <= 1, "free room stayed in pieces"
        assert arena.check_integrity() == []
        assert set(arena.extents) == set(content)
        assert arena.free_units + arena.used_units == arena.capacity
        for start, (size, expected) in content.items():
            assert memory[start : start + size] == [expected] * size


def _gaps(arena: Arena) -> list[tuple[int, int]]:
    gaps, end = [], 0
    for start, size in sorted(arena.extents.items()):
        if start > end:
            gaps.append((end, start - end))
        end = start + size
    return [*gaps, (end, arena.capacity - end)] if end < arena.capacity else gaps
