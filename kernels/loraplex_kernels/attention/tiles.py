"""Tile shapes of the attention kernel, by rows, head width and dtype: one small table.

Rows per tile are decided when a step is cut into tiles, on the host. Decode reads keys for a few rows: small
tiles, many reads in flight. Prefill multiplies: tall tiles, so that a block of keys fetched from the second
level cache feeds as many rows as the tensor cores can take, and no masks where all is visible.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DECODE_ROWS = 16
"""Rows of a small tile: the least that a tensor core product takes."""

MAX_HEAD_DIM = 256
"""The widest heads of the kernel, which holds a tile's running sums in registers."""

TALL_COST = 1.5
"""The cost of a key of a tall tile against one of a small tile: fewer programs fit a multiprocessor."""

_PROGRAMS_PER_PROCESSOR = 4
"""Programs in flight on each multiprocessor, so that a step is cut into enough of them."""

_ROOMY = (9, 10)
"""Compute capabilities whose programs may use 227 KiB of shared memory; the others have 99 KiB at least."""


@dataclass(frozen=True)
class LayerShape:
    """The shape of a layer's attention; layers of one shape share a plan. `dtype` is the queries'."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sliding_window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class AttentionTiles:
    """One kernel variant. `rows` and `keys` per block are powers of two; `phases`: keys that all rows see
    are walked without masks, apart from the others; `warps` and `stages` as Triton means them.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    phases: bool


def column_block(head_dim: int) -> int:
    """`head_dim` rounded up to what a tensor core product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class Device:
    """The properties of a device that decide on tiles. `roomy`: it has a Hopper's shared memory. `programs`:
    as many keep it busy to the end of a launch.
    """

    roomy: bool
    programs: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """The properties of a CUDA device; of a small one for any other."""
    if device.type != "cuda":
        return Device(roomy=False, programs=16)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(
        roomy=torch.cuda.get_device_capability(device)[0] in _ROOMY,
        programs=_PROGRAMS_PER_PROCESSOR * processors,
    )


@functools.cache
def narrow_floats(device: torch.device) -> bool:
    """True if Triton's kernels can convert 8-bit floats there."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def variants(head_dim: int, dtype: torch.dtype, *, roomy: bool) -> tuple[AttentionTiles, ...]:
    """The variants for a width of heads and a dtype, fewest rows first: for decode, and for prefill.

    There is no tall one for float32: without tensor cores it would only spill.
    """
    columns = column_block(head_dim)
    if dtype == torch.float32:
        return (_small(keys=32 if columns <= 64 else 16, stages=2),)
    if columns <= 64:
        return (_small(keys=64, stages=4), _tall(rows=128, keys=64, stages=3))
    if columns <= 128:
        return (_small(keys=64, stages=3), _tall(rows=128, keys=64 if roomy else 32, stages=3))
    tall = _tall(rows=128, keys=32, stages=3) if roomy else _tall(rows=64, keys=32, stages=2)
    return (_small(keys=32, stages=3), tall)


def _small(*, keys: int, stages: int) -> AttentionTiles:
    return AttentionTiles(rows=DECODE_ROWS, keys=keys, warps=4, stages=stages, phases=False)


def _tall(*, rows: int, keys: int, stages: int) -> AttentionTiles:
    return AttentionTiles(rows=rows, keys=keys, warps=8, stages=stages, phases=True)
