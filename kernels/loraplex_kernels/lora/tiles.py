"""Tile shapes of the LoRA kernels, by the number of rows an adapter has and by dtype: one small table.

Rows per tile are decided once a step, when the batch's metadata is built, since tiles are cut on the host;
the rest is looked up at launch. The sizes below follow from the shapes (decode reads adapters, a row or two
each; prefill multiplies); they are starting points until a bench on the card replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraTiles:
    """Sizes of one kernel variant, in elements, all powers of two.

    `rows`: tokens (or pairs) a tile; `shrink_rank` × `shrink_k`: the piece of A per step of the shrink;
    `planes`: into how many partial sums the shrink splits the inner dimension; `expand_rank` ×
    `expand_columns`: the piece of B per step of the expand; `*_warps`, `*_stages`: as Triton means them.
    """

    rows: int
    shrink_rank: int
    shrink_k: int
    planes: int
    expand_rank: int
    expand_columns: int
    shrink_warps: int
    shrink_stages: int
    expand_warps: int
    expand_stages: int


DECODE_ROWS = 16
PREFILL_ROWS = 64

_HALF = {
    DECODE_ROWS: LoraTiles(DECODE_ROWS, 16, 256, 8, 16, 256, 4, 3, 4, 3),
    PREFILL_ROWS: LoraTiles(PREFILL_ROWS, 32, 64, 1, 32, 128, 4, 3, 4, 3),
}
_SINGLE = {
    DECODE_ROWS: LoraTiles(DECODE_ROWS, 16, 64, 8, 16, 64, 4, 2, 4, 2),
    PREFILL_ROWS: LoraTiles(PREFILL_ROWS, 16, 32, 1, 16, 64, 4, 2, 4, 2),
}
_MIN_K_PER_PLANE = 256


def tile_rows(num_pairs: int, num_segments: int) -> int:
    """Rows per tile for a batch of `num_pairs` (token, adapter) pairs over `num_segments` distinct
    adapters.
    """
    return PREFILL_ROWS if num_pairs > 2 * DECODE_ROWS * max(num_segments, 1) else DECODE_ROWS


def choose(rows: int, dtype: torch.dtype) -> LoraTiles:
    """The tile shapes for tiles of `rows` rows and adapters held in `dtype`."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[rows]


def planes(tiles: LoraTiles, in_features: int) -> int:
    """Partial sums to split `in_features` into: never more than its worth of work."""
    result = tiles.planes
    while result > 1 and in_features < result * _MIN_K_PER_PLANE:
        result //= 2
    return result
