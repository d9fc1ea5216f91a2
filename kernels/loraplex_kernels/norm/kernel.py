"""Triton kernels of the RMS norm, and their launch.

A program has whole rows in registers, several where they are short: it reads each value once and writes each
result once, and nothing passes through memory between the addition and the norm.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.norm.reference import RmsNorm

# Per program: enough for every thread of four warps to have 16 bytes of half precision.
_ELEMENTS = 1024
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16


@triton.jit
def _normed(x, weight_ptr, column, mask, eps, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """float32 norms of the float32 rows x, zero past `WIDTH`; the caller rounds them once more."""
    dtype = weight_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    y = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
    if FORM == "rounded":
        y = y.to(dtype).to(tl.float32)
    if FORM == "offset":
        weight += 1.0
    return y * weight


@triton.jit(do_not_specialize=["rows", "inner"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < WIDTH
    mask = (row < rows)[:, None] & in_row[None, :]
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    y = _normed(x, weight_ptr, column, in_row, eps, WIDTH, FORM)
    out = out_ptr + (row.to(tl.int64) * WIDTH)[:, None] + column[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    after_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    rows,
    x_stride,
    residual_stride,
    after_eps,
    eps,
    WIDTH: tl.constexpr,
    AFTER: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < WIDTH
    mask = (row < rows)[:, None] & in_row[None, :]
    wide = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + wide * residual_stride + column[None, :], mask=mask, other=0.0)
    if AFTER is not None:
        x = _normed(x, after_ptr, column, in_row, after_eps, WIDTH, AFTER).to(dtype).to(tl.float32)
    total = (residual.to(tl.float32) + x).to(dtype)
    target = wide * WIDTH + column[None, :]
    tl.store(sum_ptr + target, total, mask=mask)
    y = _normed(total.to(tl.float32), weight_ptr, column, in_row, eps, WIDTH, FORM)
    tl.store(out_ptr + target, y.to(dtype), mask=mask)


def tile(width: int) -> tuple[int, int, int]:
    """Rows of a program, their length rounded up to a power of two, and its warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // block)
    return rows, block, min(_MAX_WARPS, max(4, rows * block // _ELEMENTS_PER_WARP))


def rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    """Launch the norm of x ``[..., N]``."""
    width = x.shape[-1]
    # Heads within the packed output of several projections: two strides, no copy.
    rows = _unit(x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, width))
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
    added, stream = (_unit(each.reshape(-1, width)) for each in (x, residual))
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


def _unit(rows: Tensor) -> Tensor:
    """`rows` with contiguous values; any other stride will do."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
