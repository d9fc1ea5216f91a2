"""The metadata of one step's attention, computed once on the host and shared by every layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels import dispatch
from loraplex_kernels.attention.cache import head_cells
from loraplex_kernels.attention.groups import QueryGroup, build_groups, to_device
from loraplex_kernels.attention.packed import DeviceTables
from loraplex_kernels.attention.plan import Ints, Queries
from loraplex_kernels.attention.tiles import LayerShape


class Step(NamedTuple):
    """The host arrays of a step, checked; see `AttentionBatch`."""

    query_start: Ints
    context_len: Ints
    block_start: Ints
    blocks: Ints
    slots: Ints
    min_blocks: int


def check_step(
    query_start: npt.ArrayLike,
    context_len: npt.ArrayLike,
    block_start: npt.ArrayLike,
    blocks: npt.ArrayLike,
    slot_mapping: npt.ArrayLike,
    *,
    block_size: int,
) -> Step:
    """Check the arguments of `AttentionBatch.build`. Raises ValueError naming the array that does not fit."""
    starts, context, table_start, table, slots = (
        np.asarray(array, dtype=np.int64)
        for array in (query_start, context_len, block_start, blocks, slot_mapping)
    )
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    if starts.ndim != 1 or not starts.size or starts[0] != 0 or starts[-1] != slots.size:
        raise ValueError(f"query_start must run from 0 to the {slots.size} tokens of slot_mapping")
    if context.shape != (starts.size - 1,) or table_start.shape != starts.shape:
        raise ValueError(f"context_len or block_start is not for query_start's {starts.size - 1} sequences")
    query_len = starts[1:] - starts[:-1]
    if (query_len < 0).any() or (context < query_len).any():
        raise ValueError("context_len must be at least the number of the sequence's rows in query_start")
    if ((table_start[1:] - table_start[:-1]) * block_size < context).any() or table_start[-1] > table.size:
        raise ValueError("block_start gives a sequence fewer cells than its context_len")
    if table_start.min(initial=0) < 0 or table.min(initial=0) < 0 or slots.min(initial=0) < 0:
        raise ValueError("block_start, blocks and slot_mapping must not be negative")
    min_blocks = int(max(table.max(initial=-1), slots.max(initial=-1) // block_size)) + 1
    return Step(starts, context, table_start, table, slots, min_blocks)


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The ragged batch of one step. Host arrays are numpy; tensors lie on `device`.

    A sequence's queries are its last positions: with `query_len = query_start[i + 1] - query_start[i]`, row
    r of sequence i stands at position `context_len[i] - query_len + r`.
    """

    num_tokens: int
    block_size: int
    min_blocks: int
    """Least number of blocks of a cache that has every block of the step."""
    query_start: Ints
    """[B + 1]: sequence i owns rows query_start[i] : query_start[i + 1]."""
    context_len: Ints
    """[B]: keys visible to the sequence's last query, this step's tokens included."""
    block_start: Ints
    """[B + 1]: sequence i owns blocks[block_start[i] : block_start[i + 1]]."""
    blocks: Ints
    """[sum of the tables' lengths]: block ids, in the order of positions."""
    slots: torch.Tensor
    """[T] int64: block * block_size + offset of the cell each token's key and value are written to."""
    _tables: DeviceTables | None = field(default=None, repr=False)
    _groups: dict[int | None, tuple[QueryGroup, ...]] = field(default_factory=dict, repr=False)
    _cells: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_start: npt.ArrayLike,
        context_len: npt.ArrayLike,
        block_start: npt.ArrayLike,
        blocks: npt.ArrayLike,
        slot_mapping: npt.ArrayLike,
        *,
        block_size: int,
        device: torch.device | str,
        layers: Iterable[LayerShape] = (),
    ) -> Self:
        """Check the step's host arrays and copy what every layer needs to `device`.

        query_start [B + 1], context_len [B], block tables in CSR form (block_start [B + 1], blocks [sum]),
        slot_mapping [T] = block * block_size + offset of the cell each token's key and value go to; integers.
        A sequence may have no query (it is skipped). Raises ValueError naming the array that does not fit.

        `layers`: shapes that the step's layers will have. Where Triton runs, theirs travel in the one copy
        made here; another's, on first use, in one more.
        """
        device = torch.device(device)
        step = check_step(query_start, context_len, block_start, blocks, slot_mapping, block_size=block_size)
        tables = None
        if dispatch.backend(device) == "triton":
            queries = Queries.of(step.query_start, step.context_len, step.block_start)
            tables = DeviceTables(queries, step.blocks, device)
            slots = tables.send(step.slots, layers)
        else:
            slots = to_device(step.slots, device)
        return cls(
            num_tokens=step.slots.size,
            block_size=block_size,
            min_blocks=step.min_blocks,
            query_start=step.query_start,
            context_len=step.context_len,
            block_start=step.block_start,
            blocks=step.blocks,
            slots=slots,
            _tables=tables,
        )

    @functools.cached_property
    def tables(self) -> DeviceTables:
        """The tables that the Triton kernels read; of a step built for torch, sent on first use."""
        if self._tables is not None:
            return self._tables
        return DeviceTables(self._queries, self.blocks, self.slots.device)

    @property
    def _queries(self) -> Queries:
        return Queries.of(self.query_start, self.context_len, self.block_start)

    def cells(self, num_kv_heads: int) -> torch.Tensor:
        """[T * Hkv] int64: the rows that each token's heads go to, of the cache seen as [.., head_dim]."""
        cells = self._cells.get(num_kv_heads)
        if cells is None:
            cells = head_cells(self.slots.unsqueeze(1), self.block_size, num_kv_heads).view(-1)
            self._cells[num_kv_heads] = cells
        return cells

    def groups(self, sliding_window: int | None) -> tuple[QueryGroup, ...]:
        """The step's rows as groups that run together under this window; built on first use."""
        groups = self._groups.get(sliding_window)
        if groups is None:
            groups = self._groups[sliding_window] = build_groups(
                self._queries, self.blocks, self.block_size, sliding_window, self.slots.device
            )
        return groups
