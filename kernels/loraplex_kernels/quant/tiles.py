"""Tile shapes of the 4-bit products, by the number of rows and by dtype: one small table.

Three families. **split**: few rows; a program owns a few output columns and all of the inner dimension,
which its warps share among them, so one launch does it. **tile**: more rows; a program owns a tile of the
output and a part of the inner dimension (a plane), and where there are several planes a second, small launch
sums them in order. **library**: many rows; a part of the weight is written out dense and multiplied by the
vendor's library, which reaches more of the matrix unit than decoding on the fly leaves of it.

The sizes follow from what the compiler makes of them for sm_90 (instructions a weight, registers, no spills)
and from the bytes that must be in flight; they are starting points for measurement.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from loraplex_kernels.quant.lookup import LOOKUPS

LIBRARY_FROM_ROWS = {torch.bfloat16: 512, torch.float16: 512, torch.float32: 65}
"""From this many rows on, writing the weight out dense costs less than the matrix unit loses to decoding."""

LIBRARY_TILE = 1 << 24
"""Elements of the dense part that the library family holds at once: 32 MiB in half precision stay in the
second-level cache (50 MiB on an H100)."""
_MIN_BLOCKS_PER_PLANE = 4
"""A plane of fewer blocks would not fill the stages of its loop."""

MAX_PLANES = 16
"""Planes at most: their sum, of 4 bytes each, must stay cheap beside reading the weight."""


@dataclass(frozen=True)
class Plan:
    """The way one product is computed.

    Attributes:
        family: "split", "tile" or "library"; of the last, nothing else matters.
        rows: of x a program takes.
        columns: output columns of a program.
        warps: as Triton means it; in the split family also the parts of the inner dimension.
        stages: as Triton means it.
        unroll: blocks of 64 input columns a step of the loop.
        planes: parts of the inner dimension, in programs apart (tile family).
        lookup: one of `lookup.LOOKUPS`.
    """

    family: Literal["split", "tile", "library"]
    rows: int = 16
    columns: int = 64
    warps: int = 4
    stages: int = 3
    unroll: int = 1
    planes: int = 1
    lookup: str = "permute"

    def __post_init__(self) -> None:
        if self.lookup not in LOOKUPS:
            raise ValueError(f"lookup: expected one of {', '.join(LOOKUPS)}, got {self.lookup!r}")


SPLIT_NARROW = Plan("split", rows=8, columns=16, warps=8, stages=4)
SPLIT_WIDE = Plan("split", rows=8, columns=32, warps=8, stages=4)
TILES = (
    Plan("tile", rows=16, columns=128, warps=4, stages=4, unroll=2),
    Plan("tile", rows=32, columns=128, warps=4, stages=4, unroll=2),
    Plan("tile", rows=64, columns=128, warps=4, stages=4),
    Plan("tile", rows=128, columns=128, warps=8, stages=3),
)
# With fp32 activations products are not the matrix unit's, and exactness, not speed, is what is asked for.
SINGLE_SPLIT = Plan("split", rows=4, columns=16, warps=4, stages=2, lookup="load")
SINGLE_TILE = Plan("tile", rows=16, columns=32, warps=4, stages=2, lookup="load")


def variants(dtype: torch.dtype) -> tuple[Plan, ...]:
    """Every plan of the table for activations of `dtype`, planes aside."""
    if dtype == torch.float32:
        return (SINGLE_SPLIT, SINGLE_TILE)
    return (SPLIT_NARROW, SPLIT_WIDE, *TILES)


@functools.lru_cache(maxsize=4096)
def choose(rows: int, n: int, blocks: int, dtype: torch.dtype, multiprocessors: int) -> Plan:
    """The plan for x of `rows` rows and a weight of `n` output columns and `blocks` blocks of 64 inputs."""
    if rows >= LIBRARY_FROM_ROWS[dtype]:
        return Plan("library")
    if dtype == torch.float32:
        found = SINGLE_SPLIT if rows <= SINGLE_SPLIT.rows else SINGLE_TILE
    elif rows <= SPLIT_WIDE.rows:
        # Enough programs for two on each multiprocessor, or narrower ones.
        found = SPLIT_WIDE if n >= 2 * multiprocessors * SPLIT_WIDE.columns else SPLIT_NARROW
    else:
        found = next((tile for tile in TILES if rows <= tile.rows), TILES[-1])
    if found.family == "split":
        return found
    return _with_planes(found, rows, n, blocks, multiprocessors)


def _with_planes(plan: Plan, rows: int, n: int, blocks: int, multiprocessors: int) -> Plan:
    programs = -(-n // plan.columns) * -(-rows // plan.rows)
    # Small tiles want company on their multiprocessor to hide latency; large ones fill it.
    wanted = multiprocessors * (2 if plan.rows <= 32 else 1)
    planes = 1
    while 2 * planes <= MAX_PLANES and 3 * programs * planes < 2 * wanted:
        if blocks < 2 * planes * _MIN_BLOCKS_PER_PLANE:
            break
        planes *= 2
    return replace(plan, planes=planes)
