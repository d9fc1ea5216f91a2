"""The step's runs sorted on the host: pairs by slot, rows by group (`batch` draws an example)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Run = tuple[int, int, tuple[tuple[int, float], ...]]
"""``(token_start, token_end, ((slot, weight), ...))``"""

DECODE_ROWS = 16
"""Rows of a tile if adapters have few rows each: the minimum of a tensor core product."""

PREFILL_ROWS = 64
"""Rows of a tile if adapters have many rows each: the minimum of Hopper's wgmma."""


class Member(NamedTuple):
    """One adapter of a group's mix: its slot, and what to add to a row to get its pair."""

    slot: int
    shift: int


class Group(NamedTuple):
    """Rows ``first_row .. end_row``, whose tokens' mixes name the same slots in the same order."""

    first_row: int
    end_row: int
    members: tuple[Member, ...]


class _GroupRun(NamedTuple):
    """A run of a group: its tokens, and the weight of each member."""

    start: int
    end: int
    weights: tuple[float, ...]


class _Piece(NamedTuple):
    """The pairs of one run with one member, which are consecutive; members count through all groups."""

    slot: int
    member: int
    token: int
    length: int
    weight: float


_Groups = Mapping[tuple[int, ...], Sequence[_GroupRun]]
"""Runs by the slots that they name, in order."""


@dataclass(frozen=True, eq=False)
class HostSegments:
    """The step's metadata as numpy arrays.

    - `num_tokens` one past the last token of the runs, 0 without a pair
    - `pair_token`, `pair_slot`, `pair_member` int64 ``[num_pairs]``: `pair_member` counts the members of all
      groups, so it orders the pairs of one token; `pair_weight` float32 ``[num_pairs]``
    - `segment` int64 ``[num_segments, 3]``: slot, first pair, end pair
    - `group_token` int64 ``[num_rows]``
    - `group` the groups, `member` int32 ``[num_members, 2]`` the members of all of them
    """

    num_tokens: int
    pair_token: np.ndarray
    pair_slot: np.ndarray
    pair_member: np.ndarray
    pair_weight: np.ndarray
    segment: np.ndarray
    group_token: np.ndarray
    group: tuple[Group, ...]
    member: np.ndarray


def tile_rows(num_pairs: int, num_segments: int) -> int:
    """Rows per tile for a batch of `num_pairs` (token, adapter) pairs over `num_segments` distinct
    adapters.
    """
    return PREFILL_ROWS if num_pairs > 2 * DECODE_ROWS * max(num_segments, 1) else DECODE_ROWS


def sort_runs(runs: Sequence[Run]) -> HostSegments:
    """Sort `runs` into pairs by slot and rows by group.

    Raises `ValueError` for runs that overlap or are not ascending, or a slot named twice in one run.
    """
    groups = _grouped(runs)
    pieces = _pieces(groups)
    slot = np.array([piece.slot for piece in pieces], np.int64)  # [pieces], as the next four
    member = np.array([piece.member for piece in pieces], np.int64)
    token = np.array([piece.token for piece in pieces], np.int64)
    length = np.array([piece.length for piece in pieces], np.int64)
    weight = np.array([piece.weight for piece in pieces], np.float32)
    order = np.argsort(slot, kind="stable")  # stable: within a slot, pieces stay in the order of groups
    sorted_length = length[order]
    pair_slot = np.repeat(slot[order], sorted_length)  # [num_pairs]
    first_pair = np.empty_like(length)  # [pieces]
    first_pair[order] = np.cumsum(sorted_length) - sorted_length
    starts = np.flatnonzero(np.diff(pair_slot, prepend=-1))  # [num_segments]
    ends = np.append(starts, len(pair_slot))[1:]

    group = _placed(groups, first_pair[np.flatnonzero(np.diff(member, prepend=-1))])
    group_runs = [run for group_runs in groups.values() for run in group_runs]
    return HostSegments(
        num_tokens=runs[-1][1] if groups else 0,
        pair_token=ranges(token[order], sorted_length),
        pair_slot=pair_slot,
        pair_member=np.repeat(member[order], sorted_length),
        pair_weight=np.repeat(weight[order], sorted_length),
        segment=np.stack([pair_slot[starts], starts, ends], axis=1),
        group_token=ranges(
            np.array([run.start for run in group_runs], np.int64),
            np.array([run.end - run.start for run in group_runs], np.int64),
        ),
        group=group,
        member=np.array([member for _, _, members in group for member in members], np.int32).reshape(-1, 2),
    )


def _grouped(runs: Sequence[Run]) -> _Groups:
    """Check the runs, and group those that name the same slots."""
    groups: dict[tuple[int, ...], list[_GroupRun]] = {}
    end = 0
    for start, stop, adapters in runs:
        if start < end or stop <= start:
            raise ValueError(
                f"runs must be ascending, disjoint and not empty, got ({start}, {stop}) after {end}"
            )
        end = stop
        slots = tuple(slot for slot, _ in adapters)
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot may be named once in a run, got {slots} for tokens {start} to {stop}")
        if slots and min(slots) < 0:
            raise ValueError(f"slots must not be negative, got {slots} for tokens {start} to {stop}")
        if slots:
            run = _GroupRun(start, stop, tuple(weight for _, weight in adapters))
            groups.setdefault(slots, []).append(run)
    return groups


def _pieces(groups: _Groups) -> list[_Piece]:
    """One piece for each run and member: group by group, then by member, then by run."""
    pieces: list[_Piece] = []
    member = 0
    for slots, group_runs in groups.items():
        for position, slot in enumerate(slots):
            pieces += [
                _Piece(slot, member, start, end - start, weights[position])
                for start, end, weights in group_runs
            ]
            member += 1
    return pieces


def _placed(groups: _Groups, first_pair: np.ndarray) -> tuple[Group, ...]:
    """The groups with their rows, one after the other; `first_pair` int64 ``[num_members]``."""
    placed: list[Group] = []
    row = member = 0
    for slots, group_runs in groups.items():
        shifts = (first_pair[member : member + len(slots)] - row).tolist()
        end_row = row + sum(end - start for start, end, _ in group_runs)
        placed.append(Group(row, end_row, tuple(map(Member, slots, shifts))))
        row, member = end_row, member + len(slots)
    return tuple(placed)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges ``starts[i] .. starts[i] + lengths[i]`` one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def cut(starts: np.ndarray, ends: np.ndarray, rows: int) -> np.ndarray:
    """Cut each range into tiles of at most `rows`: ``[num_tiles, 3]`` of index of the range, start, end."""
    counts = -(-(ends - starts) // rows)
    owner = np.repeat(np.arange(len(starts)), counts)
    first = np.repeat(starts, counts) + ranges(np.zeros_like(counts), counts) * rows
    return np.stack([owner, first, np.minimum(first + rows, ends[owner])], axis=1)
