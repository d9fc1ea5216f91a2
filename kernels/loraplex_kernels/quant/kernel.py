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
from loraplex_kernels.quant.nf4 import NESTED_BLOCK

# The interpreter multiplies bfloat16 wrongly (the same products in float32 are exact), cuts float32 off to
# bfloat16 instead of rounding it, and runs no PTX.
_INTERPRETED = tl.constexpr(dispatch.interpreting())

_HALF = tl.constexpr(BLOCK // 2)
_BLOCK = tl.constexpr(BLOCK)
_NESTED_SHIFT = tl.constexpr(NESTED_BLOCK.bit_length() - 1)
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
def _decode_nf4(codes, levels_ptr, words, dtype: tl.constexpr, LOOKUP: tl.constexpr):
    """Levels of the low and of the high nibbles, unscaled, in dtype; `words`: those of `lookup.planes`."""
    if LOOKUP != "permute":
        low = _rounded(_look_up(codes & 15, levels_ptr, LOOKUP), dtype)
        high = _rounded(_look_up(codes >> 4, levels_ptr, LOOKUP), dtype)
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _NF4_BF16,
            _NF4_CONSTRAINTS,
            [codes, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _NF4_FP16,
            _NF4_CONSTRAINTS,
            [codes, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
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
def _nf4_scale(scale_ptr, nested, block, column, n, blocks, mask, NESTED: tl.constexpr):
    """Float32 scales of one block, or several, of the given columns; `nested`: as in `NestedScale`."""
    if NESTED:
        absmax_ptr, nested_levels_ptr, offset = nested
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


@triton.jit
def _int4_weights(
    codes,
    scale_ptr,
    zero_ptr,
    block,
    column,
    ones,
    n,
    mask,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Weights of the low and of the high nibbles of blocks; a block has one group, or two."""
    group = block * _BLOCK // GROUP * n + column
    low_scale, low_zero = _int4_affine(scale_ptr, zero_ptr, group, mask, ZERO)
    high_scale = low_scale
    high_zero = low_zero
    if GROUP < _BLOCK:
        high_scale, high_zero = _int4_affine(scale_ptr, zero_ptr, group + n, mask, ZERO)
    return _decode_int4(codes, low_scale, low_zero, high_scale, high_zero, ones, dtype, LOOKUP, SPLIT)


@triton.jit
def _add_product(
    total,
    codes,
    x_low,
    x_high,
    scale_ptr,
    zero_ptr,
    nested,
    levels_ptr,
    words,
    block,
    column,
    n,
    blocks,
    mask,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NESTED: tl.constexpr,
    ZERO: tl.constexpr,
    LOOKUP: tl.constexpr,
    SPLIT: tl.constexpr,
    APART: tl.constexpr,
):
    """``total + weight @ x`` for one block of 64 inputs, or for one in each of the first dimension.

    codes ``[..., COLUMNS, 32]``; x_low and x_high ``[..., 32, ROWS]``; total ``[..., COLUMNS, ROWS]``; block,
    column and mask broadcast to ``[..., COLUMNS]``. `APART`: int4's products are summed up before they are
    added, as NF4's are, whose scale comes after the sum.
    """
    if FORMAT == "nf4":
        low, high = _decode_nf4(codes, levels_ptr, words, x_low.dtype, LOOKUP)
        scale = _nf4_scale(scale_ptr, nested, block, column, n, blocks, mask, NESTED)
        total += _products(low, high, x_low, x_high, tl.zeros_like(total)) * tl.expand_dims(scale, -1)
    else:
        low, high = _int4_weights(
            codes,
            scale_ptr,
            zero_ptr,
            block,
            column,
            words[0],
            n,
            mask,
            x_low.dtype,
            GROUP,
            ZERO,
            LOOKUP,
            SPLIT,
        )
        if APART:
            total += _products(low, high, x_low, x_high, tl.zeros_like(total))
        else:
            total = _products(low, high, x_low, x_high, total)
    return total


@triton.jit
def _store_rows(y_ptr, y, bias_ptr, row, column, n, row_mask, column_mask, HAS_BIAS: tl.constexpr):
    """Add the bias to y ``[COLUMNS, ROWS]``, round, and write it transposed; `row` is int64."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[:, None]
    y_tile = y_ptr + row[None, :] * n + column[:, None]
    tl.store(y_tile, _rounded(y, y_ptr.dtype.element_ty), mask=column_mask[:, None] & row_mask[None, :])


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
    nested = (absmax_ptr, nested_levels_ptr, offset)
    words = (w0, w1, w2, w3, w4, w5, w6, w7)
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
        total = _add_product(
            total, codes, x_low, x_high, scale_ptr, zero_ptr, nested, levels_ptr, words,
            block[:, None], column[None, :], n, blocks, mask,
            FORMAT, GROUP, NESTED, ZERO, LOOKUP, True, False,
        )  # fmt: skip
    y = tl.sum(total, axis=0)
    _store_rows(y_ptr, y, bias_ptr, row.to(tl.int64), column, n, row_mask, column_mask, HAS_BIAS)


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
    nested = (absmax_ptr, nested_levels_ptr, offset)
    words = (w0, w1, w2, w3, w4, w5, w6, w7)
    codes_tile = codes_ptr + column[:, None] * _HALF + lane[None, :]
    x_tile = x_ptr + row[None, :].to(tl.int64) * x_stride + lane[:, None]
    span = tl.cdiv(blocks, tl.num_programs(2))
    first_block = plane * span
    end_block = tl.minimum(first_block + span, blocks)

    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
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
            # ptxas may wait after every wgmma of a running sum, not after those of a short one.
            total = _add_product(
                total, codes, x_low, x_high, scale_ptr, zero_ptr, nested, levels_ptr, words,
                block, column, n, blocks, column_mask,
                FORMAT, GROUP, NESTED, ZERO, LOOKUP, False, ROWS <= 64,
            )  # fmt: skip
    y_row = plane.to(tl.int64) * rows + row
    _store_rows(y_ptr, total, bias_ptr, y_row, column, n, row_mask, column_mask, HAS_BIAS)


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
        nested = (absmax_ptr, nested_levels_ptr, offset)
        scale = _nf4_scale(scale_ptr, nested, block, column, n, blocks, column_mask, NESTED)[:, None]
        low, high = _decode_nf4(codes, levels_ptr, (0, 0, 0, 0, 0, 0, 0, 0), tl.float32, "load")
        low *= scale
        high *= scale
    else:
        low, high = _int4_weights(
            codes,
            scale_ptr,
            zero_ptr,
            block,
            column,
            0,
            n,
            column_mask,
            tl.float32,
            GROUP,
            ZERO,
            "load",
            False,
        )
    out = out_ptr + (column - first_row)[:, None].to(tl.int64) * k + block * _BLOCK + lane[None, :]
    tl.store(out, _rounded(low, out_ptr.dtype.element_ty), mask=mask)
    if PARTIAL:
        mask = mask & (block * _BLOCK + _HALF + lane < k)[None, :]
    tl.store(out + _HALF, _rounded(high, out_ptr.dtype.element_ty), mask=mask)
