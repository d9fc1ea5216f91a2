"""Tile shapes of the LoRA kernels, by the number of rows an adapter has and by dtype: one small table.

Rows per tile are decided once a step, when the batch's metadata is built, since tiles are cut on the host;
the rest is looked up at launch, from numbers that the batch's buffers fix, so a CUDA graph keeps its
variants. The sizes follow from the shapes (decode reads adapters, a row or two each; prefill multiplies) and
from what the compiler makes of them for sm_90: at decode few registers, so that many programs on a
multiprocessor keep reads in flight; wgmma at prefill; no spills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraTiles:
    """Sizes of one kernel variant, in elements, all powers of two.

    `rows`: pairs (or tokens) a tile; `shrink_rank` x `shrink_k`: the piece of A per step of the shrink;
    `expand_rank` x `expand_columns`: the piece of B per step of the expand; `*_warps` and `*_stages` as
    Triton means them.
    """

    rows: int
    shrink_rank: int
    shrink_k: int
    shrink_warps: int
    shrink_stages: int
    expand_rank: int
    expand_columns: int
    expand_warps: int
    expand_stages: int


DECODE_ROWS = 16
PREFILL_ROWS = 64

_HALF = {
    DECODE_ROWS: LoraTiles(DECODE_ROWS, 16, 128, 4, 4, 16, 128, 4, 1),
    PREFILL_ROWS: LoraTiles(PREFILL_ROWS, 32, 64, 4, 3, 32, 128, 8, 2),
}
_SINGLE = {
    DECODE_ROWS: LoraTiles(DECODE_ROWS, 16, 64, 4, 2, 16, 64, 4, 2),
    PREFILL_ROWS: LoraTiles(PREFILL_ROWS, 16, 32, 4, 2, 16, 64, 4, 2),
}

# Few pairs make few programs: split the inner dimension further, as far as each part stays worth a program.
_PLANES_UP_TO_PAIRS = ((4, 16), (32, 8), (128, 4), (512, 2))
_MIN_K_PER_PLANE = 256
PLANES = (1, 2, 4, 8, 16)


def tile_rows(num_pairs: int, num_segments: int) -> int:
    """Rows per tile for a batch of `num_pairs` (token, adapter) pairs over `num_segments` distinct
    adapters.
    """
    return PREFILL_ROWS if num_pairs > 2 * DECODE_ROWS * max(num_segments, 1) else DECODE_ROWS


def choose(rows: int, dtype: torch.dtype) -> LoraTiles:
    """The tile shapes for tiles of `rows` rows and adapters held in `dtype`."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[rows]


def planes(rows: int, num_pairs: int, in_features: int) -> int:
    """Partial sums to split `in_features` into: one of `PLANES`."""
    result = 1
    if rows == DECODE_ROWS:
        result = next((planes for pairs, planes in _PLANES_UP_TO_PAIRS if num_pairs <= pairs), 1)
    while result > 1 and in_features < result * _MIN_K_PER_PLANE:
        result //= 2
    return result
