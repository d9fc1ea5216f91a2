"""Triton kernels of the 4-bit products; `launch` starts them.

Both product kernels compute the transpose, decoded weight times x.T: the weight is then the operand that the
matrix unit may take from registers. Rows of x are few, so its tile is small and stays in shared memory.

split       grid (block of columns, block of rows). Each warp takes every S-th block of the inner dimension;
            their sums meet at the end, in one program.
tile        grid (block of columns, block of rows, plane).
sum_planes  adds planes in order, adds the bias, rounds.
dequantize  grid (block of columns, block of the inner dimension): a dense part of the weight.

NF4's levels are multiplied as they are and the scale, which all 64 inputs of a block share, is applied to the
float32 sums; int4's scale and zero are applied to the weight, with one rounding.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loraplex_kernels import dispatch
from loraplex_kernels.quant import lookup
from loraplex_kernels.quant.blocked import BLOCK

# The interpreter multiplies bfloat16 wrongly (the same products in float32 are exact), cuts float32 off to
# bfloat16 instead of rounding it, and runs no PTX.
_INTERPRETED = tl.constexpr(dispatch.interpreting())

_HALF = tl.constexpr(BLOCK // 2)
_BLOCK = tl.constexpr(BLOCK)
_NESTED_SHIFT = tl.constexpr(8)
_NF4_BF16 = tl.constexpr(lookup.nf4_ptx(torch.bfloat16))
_NF4_FP16 = tl.constexpr(lookup.nf4_ptx(torch.float16))
_NF4_CONSTRAINTS = tl.constexpr(lookup.NF4_CONSTRAINTS)
_INT4_SPLIT = tl.constexpr(lookup.int4_ptx(hex(lookup.ONES)))
_INT4_SPLIT_CONSTRAINTS = tl.constexpr(lookup.INT4_CONSTRAINTS)
_INT4_TILE = tl.constexpr(lookup.int4_ptx("$13"))
_INT4_TILE_CONSTRAINTS = tl.constexpr(lookup.INT4_TILE_CONSTRAINTS)

# Arguments whose value or divisibility would only multiply the variants to compile.
_PLAIN = ["w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7", "rows", "blocks", "first_row", "last_row"]


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """Float32 to the nearest of dtype."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _look_up(label, levels_ptr, LOOKUP: tl.constexpr):
    """Float32 levels of labels 0..15."""
    if LOOKUP == "gather":
        level = tl.load(levels_ptr + tl.arange(0, 16))
        flat = tl.reshape(label.to(tl.int32), [label.numel])
        return tl.reshape(tl.gather(level, flat, 0), label.shape)
    return tl.load(levels_ptr + label.to(tl.int32))


@triton.jit
def _decode_nf4(codes, levels_ptr, w0, w1, w2, w3, w4, w5, w6, w7, dtype: tl.constexpr, LOOKUP: tl.constexpr):
    """Levels of the low and of the high nibbles, unscaled, in dtype."""
    if LOOKUP != "permute":
        low = _rounded(_look_up(codes & 15, levels_ptr, LOOKUP), dtype)
        high = _rounded(_look_up(codes >> 4, levels_ptr, LOOKUP), dtype)
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _NF4_BF16,
            _NF4_CONSTRAINTS,
            [codes, w0, w1, w2, w3, w4, w5, w6, w7],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _NF4_FP16,
            _NF4_CONSTRAINTS,
            [codes, w0, w1, w2, w3, w4, w5, w6, w7],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _decode_int4(
    codes,
    low_scale,
    low_zero,
    high_scale,
    high_zero,
    ones,
    dtype: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Weights of the low and of the high nibbles, rounded once to dtype. Scales and zeros lack codes' last
    dimension.
    """
    low_scale = tl.expand_dims(low_scale, -1)
    low_zero = tl.expand_dims(low_zero, -1)
    high_scale = tl.expand_dims(high_scale, -1)
    high_zero = tl.expand_dims(high_zero, -1)
    if LOOKUP == "permute" and SPLIT:
        low, high = tl.inline_asm_elementwise(
            _INT4_SPLIT,
            _INT4_SPLIT_CONSTRAINTS,
            [codes, low_scale, low_zero, high_scale, high_zero],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif LOOKUP == "permute":
        low, high = tl.inline_asm_elementwise(
            _INT4_TILE,
            _INT4_TILE_CONSTRAINTS,
            [codes, low_scale, low_zero, high_scale, high_zero, ones],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((codes & 15).to(tl.float32) - 8) * low_scale.to(tl.float32) + low_zero.to(tl.float32)
        high = ((codes >> 4).to(tl.float32) - 8) * high_scale.to(tl.float32) + high_zero.to(tl.float32)
        low = _rounded(low, dtype)
        high = _rounded(high, dtype)
    return low, high


@triton.jit
def _nf4_scale(
    scale_ptr, absmax_ptr, nested_levels_ptr, offset, block, column, n, blocks, mask, NESTED: tl.constexpr
):
    """Float32 scales of one block (or several, broadcast) of the given columns."""
    if NESTED:
        word = tl.load(scale_ptr + (block >> 2) * n + column, mask=mask, other=0)
        absmax = tl.load(absmax_ptr + ((column * blocks + block) >> _NESTED_SHIFT), mask=mask, other=0.0)
        scale = tl.load(nested_levels_ptr + ((word >> ((block & 3) * 8)) & 255)) * absmax + offset
    else:
        scale = tl.load(scale_ptr + block * n + column, mask=mask, other=0.0)
    return scale


@triton.jit
def _int4_affine(scale_ptr, zero_ptr, index, mask, ZERO: tl.constexpr):
    """Scale and zero: float32, or the two bfloat16 halves of a word where there is no tensor of zeros."""
    if ZERO:
        scale = tl.load(scale_ptr + index, mask=mask, other=0.0)
        zero = tl.load(zero_ptr + index, mask=mask, other=0.0)
    else:
        word = tl.load(scale_ptr + index, mask=mask, other=0)
        scale = word.to(tl.int16).to(tl.bfloat16, bitcast=True)
        zero = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return scale, zero


@triton.jit
def _products(low, high, x_low, x_high, accumulator):
    if _INTERPRETED:
        low = low.to(tl.float32)
        high = high.to(tl.float32)
        x_low = x_low.to(tl.float32)
        x_high = x_high.to(tl.float32)
    accumulator = tl.dot(low, x_low, acc=accumulator, input_precision="ieee")
    return tl.dot(high, x_high, acc=accumulator, input_precision="ieee")


@triton.jit(do_not_specialize=_PLAIN)
def split_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    absmax_ptr,
    nested_levels_ptr,
    offset_ptr,
    levels_ptr,
    bias_ptr,
    y_ptr,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    x_stride,
    rows,
    n,
    k,
    blocks,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_mask = column < n
    row_mask = row < rows
    part = tl.arange(0, WARPS)
    lane = tl.arange(0, _HALF)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr + column, mask=column_mask, other=0.0)[None, :]
    codes_tile = codes_ptr + column[None, :, None] * _HALF + lane[None, None, :]
    x_tile = x_ptr + row[None, None, :].to(tl.int64) * x_stride + lane[None, :, None]

    total = tl.zeros((WARPS, COLUMNS, ROWS), dtype=tl.float32)
    for first in tl.range(0, blocks, WARPS, num_stages=STAGES):
        block = first + part
        inside = block < blocks
        mask = inside[:, None] & column_mask[None, :]
        codes = tl.load(
            codes_tile + (block.to(tl.int64) * n * _HALF)[:, None, None], mask=mask[:, :, None], other=0
        )
        start = block * _BLOCK
        x_mask = inside[:, None, None] & row_mask[None, None, :]
        x_block = x_tile + start[:, None, None]
        x_low = tl.load(x_block, mask=x_mask, other=0.0)
        if PARTIAL:
            x_mask = x_mask & (start + _HALF < k)[:, None, None]
        x_high = tl.load(x_block + _HALF, mask=x_mask, other=0.0)
        if FORMAT == "nf4":
            low, high = _decode_nf4(
                codes, levels_ptr, w0, w1, w2, w3, w4, w5, w6, w7, x_ptr.dtype.element_ty, LOOKUP
            )
            scale = _nf4_scale(
                scale_ptr,
                absmax_ptr,
                nested_levels_ptr,
                offset,
                block[:, None],
                column[None, :],
                n,
                blocks,
                mask,
                NESTED,
            )
            zeros = tl.zeros((WARPS, COLUMNS, ROWS), dtype=tl.float32)
            total += _products(low, high, x_low, x_high, zeros) * scale[:, :, None]
        else:
            low_group = (start // GROUP)[:, None] * n + column[None, :]
            low_scale, low_zero = _int4_affine(scale_ptr, zero_ptr, low_group, mask, ZERO)
            high_scale = low_scale
            high_zero = low_zero
            if GROUP < _BLOCK:
                high_scale, high_zero = _int4_affine(scale_ptr, zero_ptr, low_group + n, mask, ZERO)
            low, high = _decode_int4(
                codes, low_scale, low_zero, high_scale, high_zero, w0, x_ptr.dtype.element_ty, LOOKUP, True
            )
            total = _products(low, high, x_low, x_high, total)
    y = tl.sum(total, axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[:, None]
    y_tile = y_ptr + row[None, :].to(tl.int64) * n + column[:, None]
    tl.store(y_tile, _rounded(y, y_ptr.dtype.element_ty), mask=column_mask[:, None] & row_mask[None, :])


@triton.jit(do_not_specialize=_PLAIN)
def tile_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    absmax_ptr,
    nested_levels_ptr,
    offset_ptr,
    levels_ptr,
    bias_ptr,
    y_ptr,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    w6,
    w7,
    x_stride,
    rows,
    n,
    k,
    blocks,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    plane = tl.program_id(2)
    column_mask = column < n
    row_mask = row < rows
    lane = tl.arange(0, _HALF)
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_ptr + column, mask=column_mask, other=0.0)
    codes_tile = codes_ptr + column[:, None] * _HALF + lane[None, :]
    x_tile = x_ptr + row[None, :].to(tl.int64) * x_stride + lane[:, None]
    span = tl.cdiv(blocks, tl.num_programs(2))
    first_block = plane * span
    end_block = tl.minimum(first_block + span, blocks)

    zeros = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    total = zeros
    # Where a step takes several blocks, their number divides every plane's (see `matmul`).
    for first in tl.range(first_block, end_block, UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            block = first + step
            codes = tl.load(codes_tile + block.to(tl.int64) * n * _HALF, mask=column_mask[:, None], other=0)
            x_mask = row_mask[None, :]
            x_low = tl.load(x_tile + block * _BLOCK, mask=x_mask, other=0.0)
            if PARTIAL:
                x_mask = x_mask & (block * _BLOCK + _HALF + lane < k)[:, None]
            x_high = tl.load(x_tile + block * _BLOCK + _HALF, mask=x_mask, other=0.0)
            if FORMAT == "nf4":
                low, high = _decode_nf4(
                    codes, levels_ptr, w0, w1, w2, w3, w4, w5, w6, w7, x_ptr.dtype.element_ty, LOOKUP
                )
                scale = _nf4_scale(
                    scale_ptr,
                    absmax_ptr,
                    nested_levels_ptr,
                    offset,
                    block,
                    column,
                    n,
                    blocks,
                    column_mask,
                    NESTED,
                )
                total += _products(low, high, x_low, x_high, zeros) * scale[:, None]
            else:
                low_group = block * _BLOCK // GROUP * n + column
                low_scale, low_zero = _int4_affine(scale_ptr, zero_ptr, low_group, column_mask, ZERO)
                high_scale = low_scale
                high_zero = low_zero
                if GROUP < _BLOCK:
                    high_scale, high_zero = _int4_affine(
                        scale_ptr, zero_ptr, low_group + n, column_mask, ZERO
                    )
                low, high = _decode_int4(
                    codes,
                    low_scale,
                    low_zero,
                    high_scale,
                    high_zero,
                    w0,
                    x_ptr.dtype.element_ty,
                    LOOKUP,
                    False,
                )
                # ptxas may wait after every wgmma of a running sum, not after those of a short one.
                if ROWS <= 64:
                    total += _products(low, high, x_low, x_high, zeros)
                else:
                    total = _products(low, high, x_low, x_high, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[:, None]
    y_row = plane.to(tl.int64) * rows + row
    y_tile = y_ptr + y_row[None, :] * n + column[:, None]
    tl.store(y_tile, _rounded(total, y_ptr.dtype.element_ty), mask=column_mask[:, None] & row_mask[None, :])


@triton.jit
def sum_planes_kernel(
    planes_ptr, bias_ptr, y_ptr, size, n, HAS_BIAS: tl.constexpr, PLANES: tl.constexpr, COUNT: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    mask = element < size
    total = tl.zeros((COUNT,), dtype=tl.float32)
    for plane in tl.static_range(PLANES):
        total += tl.load(planes_ptr + plane * size + element, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + element % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + element, _rounded(total, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def dequantize_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    absmax_ptr,
    nested_levels_ptr,
    offset_ptr,
    levels_ptr,
    out_ptr,
    first_row,
    last_row,
    n,
    k,
    blocks,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
    ZERO: tl.constexpr,
    PARTIAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = first_row + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < last_row
    block = tl.program_id(1)
    lane = tl.arange(0, _HALF)
    mask = column_mask[:, None]
    codes_tile = codes_ptr + block.to(tl.int64) * n * _HALF + column[:, None] * _HALF + lane[None, :]
    codes = tl.load(codes_tile, mask=mask, other=0)
    if FORMAT == "nf4":
        offset = 0.0
        if NESTED:
            offset = tl.load(offset_ptr + column, mask=column_mask, other=0.0)
        scale = _nf4_scale(
            scale_ptr, absmax_ptr, nested_levels_ptr, offset, block, column, n, blocks, column_mask, NESTED
        )[:, None]
        low, high = _decode_nf4(codes, levels_ptr, 0, 0, 0, 0, 0, 0, 0, 0, tl.float32, "load")
        low *= scale
        high *= scale
    else:
        low_group = block * _BLOCK // GROUP * n + column
        high_group = (block * _BLOCK + _HALF) // GROUP * n + column
        low_scale, low_zero = _int4_affine(scale_ptr, zero_ptr, low_group, column_mask, ZERO)
        high_scale, high_zero = _int4_affine(scale_ptr, zero_ptr, high_group, column_mask, ZERO)
        low, high = _decode_int4(
            codes, low_scale, low_zero, high_scale, high_zero, 0, tl.float32, "load", False
        )
    out = out_ptr + (column - first_row)[:, None].to(tl.int64) * k + block * _BLOCK + lane[None, :]
    tl.store(out, _rounded(low, out_ptr.dtype.element_ty), mask=mask)
    if PARTIAL:
        mask = mask & (block * _BLOCK + _HALF + lane < k)[None, :]
    tl.store(out + _HALF, _rounded(high, out_ptr.dtype.element_ty), mask=mask)
