"""Cutting a step into tiles for the attention kernel, on the host.

A sequence with q queries has q * group rows per key head, row r being query r // group of query head
r % group of those that share the key head. Rows are cut into tiles of `rows`; a tile sees the keys from the
first that its first query sees to its last query's own. Where few tiles have many keys, their ranges are
divided into parts of about equal length. Each part has a plane for its partial sums, and a merge adds up a
tile's planes. Tiles with most keys come first, so that they do not begin when the others end.

Worked example: group 2, 4 rows a tile, contexts 600 and 3 with 1 and 3 queries, parts of 256::

    tile   first row, end row, token, table, position, begin, end, plane
           [0 2 0 0 599 0 256 0]  [0 2 0 0 599 256 512 1]  [0 2 0 0 599 512 600 2]
           [4 6 1 38 0 0 3 -1]  [0 4 1 38 0 0 2 -1]
    merge  first row, end row, token, first plane, end plane
           [0 2 0 0 3]

Parts are whole blocks of keys, but for the last. Past their end, tiles are neutral: an empty range of
rows. Tokens past the last sequence, in a batch of fixed size, get tiles without keys, which write zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.attention import tiles
from loraplex_kernels.attention.tiles import AttentionTiles, LayerShape

Ints = npt.NDArray[np.int64]

TILE_FIELDS = 8
"""Numbers of a tile, as drawn above: 32 bytes."""

MERGE_FIELDS = 8
"""Numbers of a merge: the five drawn above, padded to 32 bytes."""

MIN_PART = 256
"""Keys of a part at least: a plane costs about as much traffic as a few keys."""

DIVIDE_GAIN = 256
"""Ranges are divided only where that takes more keys off the longest: what a further launch costs."""


class Queries(NamedTuple):
    """The step's sequences. Each field int64 [sequences]."""

    token: Ints
    """First row in the batch."""
    query_len: Ints
    context_len: Ints
    table: Ints
    """Index of its block table's first entry."""

    @classmethod
    def of(cls, query_start: Ints, context_len: Ints, block_start: Ints) -> Queries:
        """From the arrays of an `AttentionBatch`."""
        first = query_start[:-1]
        return cls(first, query_start[1:] - first, context_len, block_start[:-1])


class Cut(NamedTuple):
    """A step cut into tiles: the arrays of the module's docstring."""

    tile: Ints
    """[tiles, TILE_FIELDS]"""
    merge: Ints
    """[divided tiles, MERGE_FIELDS]"""
    num_planes: int


class Capacity(NamedTuple):
    """The most tiles, merges and planes that any step within some bounds can have."""

    tiles: int
    merges: int
    planes: int


@dataclass(frozen=True, eq=False)
class TilePlan:
    """A step's tiles for the layers of one shape, on the device; neutral from the real ones on."""

    tiles: AttentionTiles
    num_tiles: int
    num_merges: int
    num_planes: int
    tile: torch.Tensor
    """[num_tiles, TILE_FIELDS] int32"""
    merge: torch.Tensor
    """[num_merges, MERGE_FIELDS] int32"""


def choose_tiles(queries: Queries, shape: LayerShape, *, roomy: bool) -> AttentionTiles:
    """The variant that fetches the fewest keys for these sequences, where a tall tile's cost more."""
    variants = tiles.variants(shape.head_dim, shape.dtype, roomy=roomy)
    small, tall = variants[0], variants[-1]
    num_rows = queries.query_len * shape.group
    num_keys = queries.context_len - queries.query_len // 2
    if shape.sliding_window is not None:
        num_keys = np.minimum(num_keys, shape.sliding_window)
    small_cost, tall_cost = (int(-(-num_rows // tiles_.rows) @ num_keys) for tiles_ in (small, tall))
    return tall if tall_cost * tiles.TALL_COST < small_cost else small


def cut(
    queries: Queries, shape: LayerShape, variant: AttentionTiles, programs: int, *, gain: int = DIVIDE_GAIN
) -> Cut:
    """Cut a step into tiles, so as to give about `programs` programs work. Sequences without keys (of tokens
    to be zeroed) are allowed.
    """
    rows, keys = variant.rows, variant.keys
    num_rows = queries.query_len * shape.group
    counts = -(-num_rows // rows)
    owner = np.repeat(np.arange(counts.size), counts)
    ends = np.cumsum(counts)
    first_row = (np.arange(owner.size) - (ends - counts)[owner]) * rows
    end_row = np.minimum(first_row + rows, num_rows[owner])
    position = (queries.context_len - queries.query_len)[owner]
    begin = np.zeros_like(first_row)
    if shape.sliding_window is not None:
        begin = np.maximum(position + first_row // shape.group - shape.sliding_window + 1, 0)
    end = position + (end_row - 1) // shape.group + 1
    end = np.where(queries.context_len[owner] > 0, end, begin)
    num_keys = end - begin

    order = np.argsort(-num_keys, kind="stable")
    tile = np.empty((owner.size, TILE_FIELDS), np.int64)
    fields = (first_row, end_row, queries.token[owner], queries.table[owner], position, begin, end)
    for column, field in enumerate(fields):
        tile[:, column] = field[order]
    tile[:, 7] = -1
    return _divide(tile, num_keys[order], keys, max(programs // shape.num_kv_heads, 1), gain)


def capacity(max_tokens: int, max_sequences: int, shape: LayerShape, rows: int, programs: int) -> Capacity:
    """Room for any result of `cut` for up to `max_tokens` tokens of `max_sequences` sequences.

    Includes a tail of tokens to be zeroed.
    """
    num_rows = max_tokens * shape.group
    parts = max(programs // shape.num_kv_heads, 1)
    return Capacity(min(num_rows // rows + max_sequences + 1, num_rows) + parts, parts, 2 * parts)


def _divide(tile: Ints, num_keys: Ints, keys: int, parts: int, gain: int) -> Cut:
    """Divide long ranges so that there are about `parts` parts in all. `tile` is sorted by `num_keys`."""
    longest = int(num_keys[0]) if num_keys.size else 0
    part = max(-(-int(num_keys.sum()) // parts), MIN_PART)
    if longest <= part + gain:
        return Cut(tile, np.empty((0, MERGE_FIELDS), np.int64), 0)
    counts = np.maximum(-(-num_keys // part), 1)
    # Equal parts of whole blocks of keys; rounding up may spare the last one.
    length = np.maximum(-(-num_keys // (counts * keys)) * keys, keys)
    counts = np.maximum(-(-num_keys // length), 1)
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(counts.size), counts)
    nth = np.arange(owner.size) - (ends - counts)[owner]
    divided = tile[owner]
    divided[:, 5] += nth * length[owner]
    divided[:, 6] = np.minimum(divided[:, 5] + length[owner], divided[:, 6])
    # Sorted by number of keys, so those with several parts come first, and planes are numbered as parts are.
    several = counts > 1
    num_merges = int(several.sum())
    num_planes = int(ends[num_merges - 1]) if num_merges else 0
    divided[:num_planes, 7] = np.arange(num_planes)
    merge = np.zeros((num_merges, MERGE_FIELDS), np.int64)
    merge[:, :3] = tile[:num_merges, :3]
    merge[:, 3] = (ends - counts)[:num_merges]
    merge[:, 4] = ends[:num_merges]
    return Cut(divided, merge, num_planes)
