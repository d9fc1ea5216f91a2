"""A step's queries as groups that run together, padded: how the reference takes a ragged batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels._sparse import csr
from loraplex_kernels.attention.cache import head_cells
from loraplex_kernels.attention.plan import Ints, Queries

UNROLL = 4
"""A sequence with at most this many queries runs as that many decodes; saves a launch and a gathered copy."""

DECODE_SPLIT_GAIN = 512
PREFILL_SPLIT_GAIN = 4096
"""A group is cut in two only where that saves more padded query x key pairs: what a further launch costs."""


class SparseIndex(NamedTuple):
    """The visible cells of each (decode, query head) pair, for kernels that read the cache where it lies."""

    pattern: torch.Tensor
    """Sparse CSR [n * Hq, table_rows] fp32: a row's stored columns are its cells, neither sorted nor
    distinct; their values (0 or -inf) are what is added to the logits."""
    cells: torch.Tensor
    """[n * Hq * key_len] int32 or int64: those columns, rows of the cache seen as [table_rows, head_dim]."""
    offsets: torch.Tensor
    """[n * Hq]: where each query head's cells begin in `cells`."""


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """Pieces of sequences that run together, padded to `query_len` queries and `key_len` keys each.

    Padding repeats the piece's own last query and last visible key (masked), so no cell outside the visible
    context of its sequence is ever read.
    """

    num_pieces: int
    query_len: int
    key_len: int
    block_size: int
    fresh: bool
    """All keys are this step's own rows, and each query sees every key up to itself."""
    row_start: int | None
    """First row, if the group's rows are a contiguous, unpadded range of the batch; else None."""
    rows: torch.Tensor
    """[n * query_len] int64: the batch row of each (padded) query."""
    unpad: torch.Tensor | None
    """[valid] int64: which of the padded queries are real; None when all are."""
    valid_rows: torch.Tensor
    """[valid] int64: the batch row of each real query."""
    slots: torch.Tensor
    """[n, key_len] int64: block * block_size + offset of each key."""
    hidden: torch.Tensor | None
    """[n, query_len, key_len] bool: keys that a query must not see; None when all see all, or if `fresh`."""
    _cache: dict[object, torch.Tensor | SparseIndex] = field(default_factory=dict, repr=False)

    def cells(self, num_kv_heads: int) -> torch.Tensor:
        """[n, Hkv, key_len] int64: each head's keys as rows of the cache seen as [table_rows, head_dim]."""
        cells = self._cache.get(num_kv_heads)
        if cells is None:
            cells = self._cache[num_kv_heads] = head_cells(self.slots, self.block_size, num_kv_heads)
        assert isinstance(cells, torch.Tensor)
        return cells

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[n, 1, query_len, key_len] additive mask (0 or -inf); None when nothing is hidden."""
        if self.hidden is None:
            return None
        bias = self._cache.get(dtype)
        if bias is None:
            bias = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)
            bias = self._cache[dtype] = bias.masked_fill_(self.hidden, -torch.inf).unsqueeze(1)
        assert isinstance(bias, torch.Tensor)
        return bias

    def sparse_index(
        self, num_heads: int, num_kv_heads: int, table_rows: int, *, masked: bool
    ) -> SparseIndex:
        """For groups of `query_len` 1: each query head's cells; with `masked`, padding's value is -inf."""
        key = (num_heads, num_kv_heads, table_rows, masked)
        index = self._cache.get(key)
        if index is None:
            index = self._cache[key] = self._build_sparse_index(*key)
        assert isinstance(index, SparseIndex)
        return index

    def _build_sparse_index(
        self, num_heads: int, num_kv_heads: int, table_rows: int, masked: bool
    ) -> SparseIndex:
        n, keys, device = self.num_pieces, self.key_len, self.slots.device
        total = n * num_heads * keys
        int_type = torch.int32 if max(table_rows, total) < 2**31 else torch.int64
        shape = (n, num_kv_heads, num_heads // num_kv_heads, keys)
        head_major = head_cells(self.slots.to(int_type), self.block_size, num_kv_heads)
        cells = head_major.unsqueeze(2).expand(shape).reshape(-1)
        starts = torch.arange(0, total + 1, keys, dtype=int_type, device=device)
        bias = self.bias(torch.float32) if masked else None
        values = torch.zeros(total, device=device) if bias is None else bias.expand(shape).reshape(-1)
        pattern = csr(starts, cells, values, (n * num_heads, table_rows))
        return SparseIndex(pattern, cells, starts[:-1])


class _Pieces(NamedTuple):
    """Runs of queries of one sequence. Each field [pieces]."""

    row: Ints
    """First row in the batch."""
    query_len: Ints
    first_key: Ints
    """Position of the first key that any query of the piece sees."""
    end: Ints
    """Position after the last."""
    table: Ints
    """Index of its block table's first entry."""

    def take(self, chosen: Ints) -> _Pieces:
        return _Pieces(*(column[chosen] for column in self))


def build_groups(
    queries: Queries, blocks: Ints, block_size: int, window: int | None, device: torch.device
) -> tuple[QueryGroup, ...]:
    """The step's rows as groups that run together under a sliding window; `blocks`: its block tables."""
    pieces = _pieces(queries, window)
    single = pieces.query_len == 1
    fresh = ~single & (pieces.end == pieces.query_len)
    if window is not None:
        fresh &= pieces.query_len <= window
    chunks = ~(single | fresh)
    groups: list[QueryGroup] = []
    for chosen, gain in (
        (single, DECODE_SPLIT_GAIN),
        (fresh, PREFILL_SPLIT_GAIN),
        (chunks, PREFILL_SPLIT_GAIN),
    ):
        if chosen.any():
            key_len = pieces.end - pieces.first_key
            for part in split(np.flatnonzero(chosen), pieces.query_len, key_len, gain):
                groups.append(
                    _group(pieces.take(part), blocks, block_size, window, device, fresh=chosen is fresh)
                )
    return tuple(groups)


def _pieces(queries: Queries, window: int | None) -> _Pieces:
    """One piece per sequence; one per query where there are few."""
    row, query_len, end, table = queries
    if query_len.min(initial=1) != 1 or query_len.max(initial=1) != 1:
        short = query_len <= UNROLL
        count = np.where(short, query_len, 1)
        sequence = np.repeat(np.arange(count.size), count)
        nth = np.arange(sequence.size) - np.repeat(np.cumsum(count) - count, count)
        first_end = np.where(short, end - query_len + 1, end)
        row, end, table = row[sequence] + nth, first_end[sequence] + nth, table[sequence]
        query_len = np.where(short, 1, query_len)[sequence]
    if window is None:
        first_key = np.zeros_like(end)
    else:
        first_key = np.maximum(end - query_len - window + 1, 0)
    return _Pieces(row, query_len, first_key, end, table)


def _group(
    pieces: _Pieces,
    blocks: Ints,
    block_size: int,
    window: int | None,
    device: torch.device,
    *,
    fresh: bool,
) -> QueryGroup:
    """The pieces padded to the longest: see `QueryGroup`."""
    row, query_len, first_key, end, table = (column[:, None] for column in pieces)
    num_queries, num_keys = int(query_len.max()), int((end - first_key).max())

    unpad: Ints | None = None
    if num_queries == 1:
        query = np.zeros_like(row)
        rows = valid_rows = pieces.row
    else:
        steps = np.arange(num_queries)
        query = np.minimum(steps, query_len - 1)
        rows = valid_rows = (row + query).reshape(-1)
        if (query_len != num_queries).any():
            unpad = np.flatnonzero(steps < query_len)
            valid_rows = rows[unpad]
    contiguous = unpad is None and int(rows[-1]) - int(rows[0]) == rows.size - 1
    contiguous = contiguous and bool((rows[1:] > rows[:-1]).all())

    unclipped = first_key + np.arange(num_keys)
    position = np.minimum(unclipped, end - 1)
    block = position // block_size
    slots = blocks[table + block] * block_size + (position - block * block_size)

    hidden = None
    if num_queries == 1:
        hidden = (unclipped >= end)[:, None, :]
    elif not fresh:
        query_position = (end - query_len + query)[:, :, None]
        hidden = unclipped[:, None, :] > query_position
        if window is not None:
            hidden |= unclipped[:, None, :] <= query_position - window
    if hidden is not None and not hidden.any():
        hidden = None
    device_rows = to_device(rows, device)
    return QueryGroup(
        num_pieces=rows.size // num_queries,
        query_len=num_queries,
        key_len=num_keys,
        block_size=block_size,
        fresh=fresh,
        row_start=int(rows[0]) if contiguous else None,
        rows=device_rows,
        unpad=None if unpad is None else to_device(unpad, device),
        valid_rows=device_rows if unpad is None else to_device(valid_rows, device),
        slots=to_device(slots, device),
        hidden=None if hidden is None else to_device(hidden, device),
    )


def split(chosen: Ints, query_len: Ints, key_len: Ints, gain: int) -> list[Ints]:
    """Partition the indices `chosen` so that running each part padded to its longest wastes little.

    A part is cut in two as long as some cut saves more than `gain` padded query x key pairs. `query_len` and
    `key_len` are indexed by the chosen. A part keeps their order, so that contiguous rows stay contiguous.
    """
    queries, keys = query_len[chosen], key_len[chosen]
    cost = chosen.size * int(queries.max()) * int(keys.max())
    if cost - int(queries @ keys) <= gain:
        return [chosen]
    order = np.lexsort((keys, queries))
    queries, keys = queries[order], keys[order]
    count = np.arange(1, order.size)
    below = count * queries[:-1] * np.maximum.accumulate(keys)[:-1]
    above = count[::-1] * queries[-1] * np.maximum.accumulate(keys[::-1])[::-1][1:]
    cuts = below + above
    cut = int(cuts.argmin())
    if cost - int(cuts[cut]) <= gain:
        return [chosen]
    parts = (np.sort(order[: cut + 1]), np.sort(order[cut + 1 :]))
    return [leaf for part in parts for leaf in split(chosen[part], query_len, key_len, gain)]


def to_device(
    array: npt.NDArray[np.int64] | npt.NDArray[np.bool_], device: torch.device | str
) -> torch.Tensor:
    """A copy on the device, of any strides."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
