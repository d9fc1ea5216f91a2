"""What one step's attention needs to know, worked out once on the host and shared by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]

# A further group costs some launches; padding costs key cells (decode) or query x key pairs (prefill).
# A group is split only where the padding saved outweighs a launch, in these units.
DECODE_SPLIT_GAIN = 512
PREFILL_SPLIT_GAIN = 4096


class SparseIndex(NamedTuple):
    """The key cells of each (sequence, query head) pair, for kernels that read the cache in place."""

    mask: torch.Tensor
    """Sparse CSR [n * Hq, table_rows] fp32: row = a query head, stored columns = its cells, values 0 or -inf."""
    pattern: torch.Tensor
    """The same cells with every value 0."""
    cells: torch.Tensor
    """[n * Hq * S] int32 or int64: the rows of the cache seen as [table_rows, D]."""
    offsets: torch.Tensor
    """[n * Hq]: where each query head's cells begin in `cells`."""


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """Sequences of one step that run together, padded to `query_len` queries and `key_len` keys each.

    Padding repeats the sequence's own last query and last visible key (masked), so no cell outside the
    visible context of the sequence is ever read.
    """

    num_sequences: int
    query_len: int
    key_len: int
    fresh: bool
    """Every key is one of this step's tokens and each query sees all keys up to itself."""
    row_start: int | None
    """First row, if the group's rows are a contiguous, unpadded range of the batch; else None."""
    rows: torch.Tensor
    """[n * query_len] int64: the batch row of each (padded) query."""
    unpad: torch.Tensor | None
    """[valid] int64: which of the padded queries are real; None when all are."""
    valid_rows: torch.Tensor
    """[valid] int64: the batch row of each real query."""
    cells: torch.Tensor
    """[n * key_len] int64: block * 2 * block_size + offset, the key's row in the cache seen as [.., Hkv * D]."""
    hidden: torch.Tensor | None
    """[n, query_len, key_len] bool: keys that a query must not see; None when all see all."""
    _cache: dict[object, torch.Tensor | SparseIndex] = field(default_factory=dict, repr=False)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[n, 1, query_len, key_len] additive mask (0 or -inf), built on first use; None when nothing is hidden."""
        if self.hidden is None:
            return None
        bias = self._cache.get(dtype)
        if bias is None:
            bias = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            bias = self._cache[dtype] = bias.masked_fill_(self.hidden, -torch.inf).unsqueeze(1)
        assert isinstance(bias, torch.Tensor)
        return bias

    def sparse_index(self, num_heads: int, num_kv_heads: int, table_rows: int) -> SparseIndex:
        """For groups of `query_len` 1: per query head, its cells in the cache seen as [table_rows, D]."""
        key = (num_heads, num_kv_heads, table_rows)
        index = self._cache.get(key)
        if index is None:
            index = self._cache[key] = self._build_sparse_index(*key)
        assert isinstance(index, SparseIndex)
        return index

    def _build_sparse_index(self, num_heads: int, num_kv_heads: int, table_rows: int) -> SparseIndex:
        n, keys, device = self.num_sequences, self.key_len, self.cells.device
        int_type = torch.int32 if max(table_rows, n * num_heads * keys) < 2**31 else torch.int64
        shape = (n, num_kv_heads, num_heads // num_kv_heads, keys)
        heads = torch.arange(num_kv_heads, device=device).view(1, num_kv_heads, 1, 1)
        cells = (self.cells.view(n, 1, 1, keys) * num_kv_heads + heads).to(int_type).expand(shape).reshape(-1)
        starts = torch.arange(0, n * num_heads * keys + 1, keys, dtype=int_type, device=device)
        zeros = torch.zeros(cells.numel(), device=device)
        bias = self.bias(torch.float32)
        values = zeros if bias is None else bias.expand(shape).reshape(-1)
        size = (n * num_heads, table_rows)
        pattern = torch.sparse_csr_tensor(starts, cells, zeros, size=size, check_invariants=False)
        mask = pattern
        if bias is not None:
            mask = torch.sparse_csr_tensor(starts, cells, values, size=size, check_invariants=False)
        return SparseIndex(mask, pattern, cells, starts[:-1])


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The ragged batch of one step. Host arrays are numpy; tensors lie on `device`.

    A sequence's queries are its last positions: with `query_len = query_start[i + 1] - query_start[i]`, row r of
    sequence i stands at position `context_len[i] - query_len + r`.
    """

    num_tokens: int
    block_size: int
    query_start: Ints
    """[B + 1]: sequence i owns rows query_start[i] : query_start[i + 1]."""
    context_len: Ints
    """[B]: keys visible to the sequence's last query, this step's tokens included."""
    block_start: Ints
    """[B + 1]: sequence i owns blocks[block_start[i] : block_start[i + 1]]."""
    blocks: Ints
    """[sum of the tables' lengths]: block ids, in the order of positions."""
    cells: torch.Tensor
    """[T] int64: where each token's key is written: its row in the cache seen as [.., Hkv * D]."""
    _groups: dict[int | None, tuple[QueryGroup, ...]] = field(default_factory=dict, repr=False)

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
    ) -> Self:
        """Check the step's host arrays and copy what every layer needs to `device`.

        query_start [B + 1], context_len [B], block tables in CSR form (block_start [B + 1], blocks [sum]),
        slot_mapping [T] = block * block_size + offset of the cell each token's key and value go to; integers.
        A sequence may have no query (it is skipped). Raises ValueError naming the array that does not fit.
        """
        starts, context, table_start, table, slots = (
            np.asarray(array, dtype=np.int64)
            for array in (query_start, context_len, block_start, blocks, slot_mapping)
        )
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        if starts.ndim != 1 or not starts.size or starts[0] != 0 or starts[-1] != slots.size:
            raise ValueError(f"query_start must run from 0 to the {slots.size} tokens of slot_mapping")
        if context.shape != (starts.size - 1,) or table_start.shape != starts.shape:
            raise ValueError(
                f"query_start is for {starts.size - 1} sequences, context_len or block_start is not"
            )
        query_len = np.diff(starts)
        if np.any(query_len < 0) or np.any(context < query_len):
            raise ValueError("context_len must be at least the number of the sequence's rows in query_start")
        if np.any(np.diff(table_start) * block_size < context) or table_start[-1] > table.size:
            raise ValueError("block_start gives a sequence fewer cells than its context_len")
        cells = slots + slots // block_size * block_size
        return cls(
            num_tokens=int(starts[-1]),
            block_size=block_size,
            query_start=starts,
            context_len=context,
            block_start=table_start,
            blocks=table,
            cells=_to_device(cells, device),
        )

    def groups(self, sliding_window: int | None) -> tuple[QueryGroup, ...]:
        """The step's rows as groups that run together under this window; built on first use."""
        groups = self._groups.get(sliding_window)
        if groups is None:
            groups = self._groups[sliding_window] = self._build_groups(sliding_window)
        return groups

    def _build_groups(self, window: int | None) -> tuple[QueryGroup, ...]:
        query_len = np.diff(self.query_start)
        first_position = self.context_len - query_len
        first_key = np.zeros_like(first_position)
        if window is not None:
            first_key = np.maximum(first_position - window + 1, 0)
        key_len = self.context_len - first_key
        decodes = query_len == 1
        fresh = ~decodes & (first_position == 0) & (query_len > 0)
        if window is not None:
            fresh &= query_len <= window
        chunks = (query_len > 1) & ~fresh
        found: list[QueryGroup] = []
        for chosen, gain in (
            (decodes, DECODE_SPLIT_GAIN),
            (fresh, PREFILL_SPLIT_GAIN),
            (chunks, PREFILL_SPLIT_GAIN),
        ):
            for sequences in split(np.flatnonzero(chosen), query_len, key_len, gain):
                found.append(self._group(sequences, query_len, first_key, window, fresh=chosen is fresh))
        return tuple(found)

    def _group(
        self, sequences: Ints, all_query_len: Ints, all_first_key: Ints, window: int | None, *, fresh: bool
    ) -> QueryGroup:
        device = self.cells.device
        context, first_key = self.context_len[sequences], all_first_key[sequences]
        query_len, row = all_query_len[sequences], self.query_start[sequences]
        last_key = context - 1
        num_queries, num_keys = int(query_len.max()), int((context - first_key).max())

        query = np.minimum(np.arange(num_queries), query_len[:, None] - 1)
        rows = (row[:, None] + query).reshape(-1)
        padded = bool(np.any(query_len != num_queries))
        unpad = np.flatnonzero(np.arange(num_queries) < query_len[:, None]) if padded else None
        valid_rows = rows if unpad is None else rows[unpad]
        contiguous = not padded and bool(np.all(np.diff(rows) == 1))

        unclipped = first_key[:, None] + np.arange(num_keys)
        position = np.minimum(unclipped, last_key[:, None])
        block, offset = np.divmod(position, self.block_size)
        cells = self.blocks[self.block_start[sequences][:, None] + block] * (2 * self.block_size) + offset

        hidden = None
        if not fresh:
            query_position = (context - query_len)[:, None] + query
            seen = unclipped[:, None, :] <= query_position[:, :, None]
            if window is not None:
                seen &= unclipped[:, None, :] > query_position[:, :, None] - window
            if not seen.all():
                hidden = ~seen
        return QueryGroup(
            num_sequences=len(sequences),
            query_len=num_queries,
            key_len=num_keys,
            fresh=fresh,
            row_start=int(rows[0]) if contiguous else None,
            rows=_to_device(rows, device),
            unpad=None if unpad is None else _to_device(unpad, device),
            valid_rows=_to_device(valid_rows, device),
            cells=_to_device(cells.reshape(-1), device),
            hidden=None if hidden is None else _to_device(hidden, device),
        )


def split(sequences: Ints, query_len: Ints, key_len: Ints, gain: int) -> list[Ints]:
    """Partition `sequences` so that running each part padded to its longest wastes little.

    A part is cut in two as long as some cut saves more than `gain` padded query x key pairs. `query_len` and
    `key_len` are indexed by sequence. Sequences of a part keep their order, so rows stay contiguous if they were.
    """
    if not sequences.size:
        return []
    queries, keys = query_len[sequences], key_len[sequences]
    cost = sequences.size * int(queries.max()) * int(keys.max())
    if cost - int(queries @ keys) <= gain:
        return [sequences]
    order = np.lexsort((keys, queries))
    queries, keys = queries[order], keys[order]
    count = np.arange(1, order.size)
    below = count * queries[:-1] * np.maximum.accumulate(keys)[:-1]
    above = count[::-1] * queries[-1] * np.maximum.accumulate(keys[::-1])[::-1][1:]
    cuts = below + above
    cut = int(cuts.argmin())
    if cost - int(cuts[cut]) <= gain:
        return [sequences]
    parts = (np.sort(order[: cut + 1]), np.sort(order[cut + 1 :]))
    return [leaf for part in parts for leaf in split(sequences[part], query_len, key_len, gain)]


def _to_device(
    array: npt.NDArray[np.int64] | npt.NDArray[np.bool_], device: torch.device | str
) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
