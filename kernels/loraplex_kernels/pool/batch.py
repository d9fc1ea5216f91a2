"""The metadata of one step: the (token, adapter) pairs, sorted and cut into tiles on the host.

A batch arrives as *runs*: ``(token_start, token_end, ((slot, weight), ...))``, contiguous tokens that share
one mix of adapters, ascending and disjoint; tokens in no run have no adapter. Two views of it are
made:

- *pairs* (token, slot, weight), sorted by slot: the shrink's rows. A tile of the shrink is up to
  ``tile_rows`` pairs of one slot, so it reads one adapter.
- *groups* of tokens whose mixes name the same slots in the same order (weights may differ): the
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

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.pool import segments
from loraplex_kernels.pool.segments import HostSegments, Run

_Derived = TypeVar("_Derived")

_FIELDS = ("pair_token", "pair_weight", "shrink_tile", "group_token", "expand_tile", "member")
# Numbers of one row of the tables that have several, as the module's docstring draws them.
_SHRINK_TILE, _EXPAND_TILE, _MEMBER = 3, 4, 2


@dataclass(frozen=True, eq=False)
class LoraBatch:
    """One step's metadata; the module's docstring draws each tensor. Valid until its buffers are filled
    again.

    `num_pairs` is 0 if no token has an adapter: do not call the op then; it would launch nothing.
    `num_tokens` is one past the last token of the runs. `shrink_tiles` and `expand_tiles` are the grids
    (with neutral tiles at the end, where the buffers have a fixed grid), `pair_rows` the rows of the
    intermediate result.
    `cache` holds data that ops derive from this batch.
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

    def derived(self, key: Hashable, version: int, derive: Callable[[], _Derived]) -> _Derived:
        """``derive()``, kept with the batch under `key` until the pool's tables have another `version`."""
        kept = self.cache.get(key)
        if kept is None or kept[0] != version:
            kept = self.cache[key] = (version, derive())
        derived: _Derived = kept[1]
        return derived

    def check_rows(self, rows: Tensor, name: str, columns: int) -> None:
        """Raise `ValueError` unless rows ``[T, N]`` have the batch's tokens and `columns` at least."""
        if rows.dim() != 2 or rows.shape[1] < columns or rows.shape[0] < self.num_tokens:
            raise ValueError(
                f"{name} must be at least [{self.num_tokens}, {columns}] as the batch and the site say, "
                f"got {tuple(rows.shape)}"
            )

    @classmethod
    def build(cls, runs: Sequence[Run], device: torch.device | str = "cpu") -> LoraBatch:
        """Metadata of `runs` in new buffers. A server keeps `LoraBatchBuffers` instead."""
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
        self._fixed_rows = segments.tile_rows(max_pairs, self.max_segments) if fixed_grid else None
        rows = self._fixed_rows or segments.DECODE_ROWS
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
        host = segments.sort_runs(runs)
        self._check_capacity(host)
        num_pairs = len(host.pair_token)
        rows = self._fixed_rows or segments.tile_rows(num_pairs, len(host.segment))
        shrink_tile = segments.cut(host.segment[:, 1], host.segment[:, 2], rows)
        group_rows = np.array([group[:2] for group in host.group], np.int64).reshape(-1, 2)
        expand_tile = segments.cut(group_rows[:, 0], group_rows[:, 1], rows)
        member_end = np.cumsum([len(group.members) for group in host.group], dtype=np.int64)

        if self._copied is not None:
            self._copied.synchronize()
        array = self._array
        array["pair_token"][:num_pairs] = host.pair_token
        array["pair_weight"][:num_pairs] = host.pair_weight
        array["group_token"][: len(host.group_token)] = host.group_token
        array["member"][: len(host.member)] = host.member
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
            num_tokens=host.num_tokens,
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
