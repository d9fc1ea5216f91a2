"""The launch of the RMS norm's kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.norm.kernel import add_rms_norm_kernel, rms_norm_kernel
from loraplex_kernels.norm.reference import RmsNorm
from loraplex_kernels.strides import contiguous_rows

_ELEMENTS = 1024
"""Elements of a program at least: every thread of four warps has 16 bytes of half precision."""

_ELEMENTS_PER_WARP = 512
"""Elements of a warp of wider rows: 16 for each thread, in registers."""

_MAX_WARPS = 16


class Tile(NamedTuple):
    """A program's share: its rows, their length rounded up to a power of two, and its warps."""

    rows: int
    block: int
    warps: int


def tile(width: int) -> Tile:
    """The share of a program of rows of `width` values."""
    block = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // block)
    return Tile(rows, block, min(_MAX_WARPS, max(4, rows * block // _ELEMENTS_PER_WARP)))


def rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    """Launch the norm of x ``[..., N]``."""
    width = x.shape[-1]
    # Heads within the packed output of several projections: two strides, no copy.
    rows = contiguous_rows(x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, width))
    out = x.new_empty(x.shape)
    count = rows.shape[0] * rows.shape[1]
    per_program, block, warps = tile(width)
    rms_norm_kernel[(triton.cdiv(count, per_program),)](
        rows,
        norm.weight,
        out,
        count,
        rows.shape[1],
        rows.stride(0),
        rows.stride(1),
        norm.eps,
        WIDTH=width,
        FORM=norm.form,
        ROWS=per_program,
        BLOCK=block,
        num_warps=warps,
    )
    dispatch.count("norm.rms", "triton")
    return out


def add_rms_norm(x: Tensor, residual: Tensor, norm: RmsNorm, after: RmsNorm | None) -> tuple[Tensor, Tensor]:
    """Launch the sum and its norm, for x and residual ``[..., N]``."""
    width = x.shape[-1]
    added, stream = (contiguous_rows(each.reshape(-1, width)) for each in (x, residual))
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    per_program, block, warps = tile(width)
    add_rms_norm_kernel[(triton.cdiv(added.shape[0], per_program),)](
        added,
        stream,
        norm.weight if after is None else after.weight,
        norm.weight,
        total,
        out,
        added.shape[0],
        added.stride(0),
        stream.stride(0),
        0.0 if after is None else after.eps,
        norm.eps,
        WIDTH=width,
        AFTER=None if after is None else after.form,
        FORM=norm.form,
        ROWS=per_program,
        BLOCK=block,
        num_warps=warps,
    )
    dispatch.count("norm.add_rms", "triton")
    return total, out
