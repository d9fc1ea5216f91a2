"""Triton kernels of the RMS norm.

A program has whole rows in registers, several where they are short: it reads each value once and writes each
result once, and nothing passes through memory between the addition and the norm.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


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
