"""The metadata of one step: which token meets which adapter, sorted and cut into tiles on the host.

A batch arrives as *runs*: ``(token_start, token_end, ((slot, weight), ...))``, contiguous tokens that share
one composition of adapters, ascending and disjoint; tokens in no run have no adapter. Two views of it are
made:

- *pairs* (token, slot, weight), sorted by slot: the shrink's rows. A tile of the shrink is up to
  ``tile_rows`` pairs of one slot, so it reads one adapter.
- *groups* of tokens whose compositions name the same slots in the same order (weights may differ): the
  expand's rows. A tile of the expand is up to ``tile_rows`` tokens of one group; it adds the group's
  *members* one after the other into one accumulator, so each output row is read, added to and written once.

Within a slot, pairs follow the order of the groups. So the pairs of a group's member are consecutive too, and
"row of the group" → "pair" is one addition. Worked example, with ``tile_rows=2``::

    runs                 (0, 2, ((3, 1.0),))   (2, 3, ((1, 0.5), (3, 2.0)))   (4, 5, ((3, 1.0),))

    pair_token   [2 | 0 1 4 2]         token of each pair: one pair of slot 1, four of slot 3
    pair_weight  [.5| 1 1 1 2]         its weight
    shrink_tile  [(1,0,1) (3,1,3) (3,3,5)]           slot, first pair, end pair
    group_token  [0 1 4 | 2]           token of each row: group of slot (3), group of slots (1, 3)
    expand_tile  [(0,2,0,1) (2,3,0,1) (3,4,1,3)]     first row, end row, first member, end member
    member       [(3,1) | (1,-3) (3,1)]              slot, and what to add to a row to get its pair

All six live in one int32 buffer (weights as their bits), so a step costs one host-to-device copy. Past their
end, tiles are neutral: slot -1, or an empty range of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.lora import tiles

Run = tuple[int, int, tuple[tuple[int, float], ...]]
"""``(token_start, token_end, ((slot, weight), ...))``"""

_FIELDS = ("pair_token", "pair_weight", "shrink_tile", "group_token", "expand_tile", "member")
_SHRINK_TILE, _EXPAND_TILE, _MEMBER = 3, 4, 2


@dataclass(frozen=True, eq=False)
class HostSegments:
    """The same metadata as numpy arrays, for the CPU path.

    - `pair_token`, `pair_slot`, `pair_member` int64 ``[num_pairs]``: `pair_member` counts the members of all
      groups, so it orders the pairs of one token; `pair_weight` float32 ``[num_pairs]``
    - `segment` int64 ``[num_segments, 3]``: slot, first pair, end pair
    - `group_token` int64 ``[num_rows]``
    - `group` per group: ``(first row, end row, ((slot, pair shift), ...))``
    """

    pair_token: np.ndarray
    pair_slot: np.ndarray
    pair_member: np.ndarray
    pair_weight: np.ndarray
    segment: np.ndarray
    group_token: np.ndarray
    group: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True, eq=False)
class LoraBatch:
    """One step's metadata; the module's docstring draws each tensor. Valid until its buffers are filled
    again.

    `num_pairs` is 0 when no token has an adapter: the op is then not to be called, and launches nothing.
    `num_tokens` is one past the last token of the runs. `shrink_tiles` and `expand_tiles` are the grids
    (with neutral tiles at the end, where the buffers have a fixed grid), `pair_rows` the rows of the
    intermediate result.
    `cache` holds what the CPU path derives from this batch.
    """

    num_tokens: int
    num_pairs: int
    tile_rows: int
    shrink_tiles: int
    expand_tiles: int
    pair_rows: int
    pair_token: Tensor
    pair_weight: Tensor
    shrink_tile: Tensor
    group_token: Tensor
    expand_tile: Tensor
    member: Tensor
    host: HostSegments = field(repr=False)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, runs: Sequence[Run], device: torch.device | str = "cpu") -> LoraBatch:
        """Metadata of `runs` in buffers of its own. A server keeps `LoraBatchBuffers` instead."""
        tokens = sum(end - start for start, end, _ in runs)
        pairs = sum((end - start) * len(adapters) for start, end, adapters in runs)
        return LoraBatchBuffers(max_tokens=max(tokens, 1), max_pairs=max(pairs, 1), device=device).fill(runs)


class LoraBatchBuffers:
    """Preallocated metadata of fixed capacity, filled once a step.

    `fixed_grid` makes the grids depend on the capacities alone, as a CUDA graph needs: capture with one set
    of buffers per graph, fill them, replay. The tensors of every `LoraBatch` from one object are the same.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_pairs: int,
        max_segments: int | None = None,
        device: torch.device | str = "cpu",
        fixed_grid: bool = False,
    ) -> None:
        """Room for `max_tokens` tokens with adapters, `max_pairs` pairs, `max_segments` distinct adapters."""
        self.max_tokens = max_tokens
        self.max_pairs = max_pairs
        self.max_segments = min(max_pairs, max_segments or max_pairs)
        self.fixed_grid = fixed_grid
        self._fixed_rows = tiles.tile_rows(max_pairs, self.max_segments) if fixed_grid else None
        rows = self._fixed_rows or tiles.DECODE_ROWS
        self._shrink_capacity = min(max_pairs, max_pairs // rows + self.max_segments)
        self._expand_capacity = max_tokens
        sizes = {
            "pair_token": max_pairs,
            "pair_weight": max_pairs,
            "shrink_tile": self._shrink_capacity * _SHRINK_TILE,
            "group_token": max_tokens,
            "expand_tile": self._expand_capacity * _EXPAND_TILE,
            "member": max_pairs * _MEMBER,
        }
        offsets = np.concatenate([[0], np.cumsum([-(-sizes[name] // 4) * 4 for name in _FIELDS])])
        device = torch.device(device)
        pinned = device.type == "cuda"
        self._packed_host = torch.zeros(int(offsets[-1]), dtype=torch.int32, pin_memory=pinned)
        self._packed = self._packed_host.to(device)
        self._copied = torch.cuda.Event() if pinned else None
        packed_array = self._packed_host.numpy()
        self._array: dict[str, np.ndarray] = {}
        self._tensor: dict[str, Tensor] = {}
        for name, offset in zip(_FIELDS, offsets[:-1], strict=True):
            window = slice(int(offset), int(offset) + sizes[name])
            self._array[name] = packed_array[window]
            self._tensor[name] = self._packed[window]
        self._array["pair_weight"] = self._array["pair_weight"].view(np.float32)
        self._tensor["pair_weight"] = self._tensor["pair_weight"].view(torch.float32)
        widths = {"shrink_tile": _SHRINK_TILE, "expand_tile": _EXPAND_TILE, "member": _MEMBER}
        for name, width in widths.items():
            self._array[name] = self._array[name].reshape(-1, width)
            self._tensor[name] = self._tensor[name].view(-1, width)
        self._last: tuple[list[Run], LoraBatch] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._packed.nbytes

    def fill(self, runs: Sequence[Run]) -> LoraBatch:
        """Metadata of `runs`; the copy to the device is queued on the current stream.

        The same runs as last time (steady decode) give the same batch, and no copy. Raises `ValueError` for
        runs that overlap or are not ascending, a slot named twice in one run, or a batch over the capacities.
        """
        runs = list(runs)
        if self._last is not None and self._last[0] == runs:
            return self._last[1]
        self._last = None
        host, members, num_tokens = _sort(runs)
        self._check_capacity(host)
        num_pairs = len(host.pair_token)
        rows = self._fixed_rows or tiles.tile_rows(num_pairs, len(host.segment))
        shrink_tile = _cut(host.segment[:, 1], host.segment[:, 2], rows)
        group_rows = np.array([(start, end) for start, end, _ in host.group], np.int64).reshape(-1, 2)
        expand_tile = _cut(group_rows[:, 0], group_rows[:, 1], rows)
        member_end = np.cumsum([len(group_members) for _, _, group_members in host.group], dtype=np.int64)

        if self._copied is not None:
            self._copied.synchronize()
        array = self._array
        array["pair_token"][:num_pairs] = host.pair_token
        array["pair_weight"][:num_pairs] = host.pair_weight
        array["group_token"][: len(host.group_token)] = host.group_token
        array["member"][: len(members)] = members
        array["shrink_tile"][:] = (-1, 0, 0)
        array["shrink_tile"][: len(shrink_tile), 0] = host.segment[shrink_tile[:, 0], 0]
        array["shrink_tile"][: len(shrink_tile), 1:] = shrink_tile[:, 1:]
        array["expand_tile"][:] = 0
        array["expand_tile"][: len(expand_tile), :2] = expand_tile[:, 1:]
        array["expand_tile"][: len(expand_tile), 3] = member_end[expand_tile[:, 0]]
        lengths = np.diff(member_end, prepend=0)
        array["expand_tile"][: len(expand_tile), 2] = (member_end - lengths)[expand_tile[:, 0]]
        if self._packed is not self._packed_host:
            self._packed.copy_(self._packed_host, non_blocking=True)
            if self._copied is not None:
                self._copied.record()

        batch = LoraBatch(
            num_tokens=num_tokens,
            num_pairs=num_pairs,
            tile_rows=rows,
            shrink_tiles=self._shrink_capacity if self.fixed_grid else len(shrink_tile),
            expand_tiles=self._expand_capacity if self.fixed_grid else len(expand_tile),
            pair_rows=self.max_pairs if self.fixed_grid else num_pairs,
            pair_token=self._tensor["pair_token"],
            pair_weight=self._tensor["pair_weight"],
            shrink_tile=self._tensor["shrink_tile"],
            group_token=self._tensor["group_token"],
            expand_tile=self._tensor["expand_tile"],
            member=self._tensor["member"],
            host=host,
        )
        self._last = (runs, batch)
        return batch

    def _check_capacity(self, host: HostSegments) -> None:
        for name, needed, capacity in (
            ("max_tokens", len(host.group_token), self.max_tokens),
            ("max_pairs", len(host.pair_token), self.max_pairs),
            ("max_segments", len(host.segment), self.max_segments),
        ):
            if needed > capacity:
                raise ValueError(f"the batch needs {name} of at least {needed}, the buffers have {capacity}")


def _sort(runs: list[Run]) -> tuple[HostSegments, np.ndarray, int]:
    """Runs → pairs by slot and rows by group, the member table, and one past the last token."""
    groups: dict[tuple[int, ...], list[tuple[int, int, tuple[float, ...]]]] = {}
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
            groups.setdefault(slots, []).append((start, stop, tuple(weight for _, weight in adapters)))

    # One piece per (run, member): its pairs are consecutive. A stable sort by slot keeps groups together.
    pieces: list[tuple[int, int, int, int, float]] = []
    piece_of_member: list[int] = []
    row_range: list[tuple[int, int]] = []
    run_start: list[int] = []
    run_length: list[int] = []
    row = 0
    for slots, group_runs in groups.items():
        first_row = row
        for position, slot in enumerate(slots):
            piece_of_member.append(len(pieces))
            for start, stop, weights in group_runs:
                pieces.append((slot, len(piece_of_member) - 1, start, stop - start, weights[position]))
        for start, stop, _ in group_runs:
            run_start.append(start)
            run_length.append(stop - start)
            row += stop - start
        row_range.append((first_row, row))

    slot_of_piece = np.array([piece[0] for piece in pieces], np.int64)
    member_of_piece = np.array([piece[1] for piece in pieces], np.int64)
    token_of_piece = np.array([piece[2] for piece in pieces], np.int64)
    length_of_piece = np.array([piece[3] for piece in pieces], np.int64)
    weight_of_piece = np.array([piece[4] for piece in pieces], np.float32)
    order = np.argsort(slot_of_piece, kind="stable")
    sorted_length = length_of_piece[order]
    pair_start = np.empty_like(length_of_piece)
    pair_start[order] = np.cumsum(sorted_length) - sorted_length
    pair_slot = np.repeat(slot_of_piece[order], sorted_length)
    starts = np.flatnonzero(np.diff(pair_slot, prepend=-1))
    ends = np.append(starts, len(pair_slot))[1:]
    segment = np.stack([pair_slot[starts], starts, ends], axis=1)

    members: list[tuple[int, int]] = []
    group: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    for slots, (first_row, end_row) in zip(groups, row_range, strict=True):
        first = len(members)
        for slot in slots:
            members.append((slot, int(pair_start[piece_of_member[len(members)]]) - first_row))
        group.append((first_row, end_row, tuple(members[first:])))

    host = HostSegments(
        pair_token=ranges(token_of_piece[order], sorted_length),
        pair_slot=pair_slot,
        pair_member=np.repeat(member_of_piece[order], sorted_length),
        pair_weight=np.repeat(weight_of_piece[order], sorted_length),
        segment=segment,
        group_token=ranges(np.array(run_start, np.int64), np.array(run_length, np.int64)),
        group=tuple(group),
    )
    return host, np.array(members, np.int32).reshape(-1, _MEMBER), end if groups else 0


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges ``starts[i] .. starts[i] + lengths[i]`` one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def _cut(starts: np.ndarray, ends: np.ndarray, rows: int) -> np.ndarray:
    """Cut each range into tiles of at most `rows`: ``[num_tiles, 3]`` of index of the range, start, end."""
    counts = -(-(ends - starts) // rows)
    owner = np.repeat(np.arange(len(starts)), counts)
    first = np.repeat(starts, counts) + ranges(np.zeros_like(counts), counts) * rows
    return np.stack([owner, first, np.minimum(first + rows, ends[owner])], axis=1)
