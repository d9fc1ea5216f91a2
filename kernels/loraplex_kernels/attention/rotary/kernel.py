"""The Triton kernel of rotation and write.

grid (token, block of query heads, then of key heads). A program reads both halves of its heads before it
writes either, so that queries can be rotated where they lie. Key heads go to their token's cell, if it has
one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turned(here, there, cos, sin):
    """``here * cos`` and ``there * sin``, rounded to their dtype; their sum is not yet."""
    dtype = here.dtype
    straight = (here.to(tl.float32) * cos.to(tl.float32)).to(dtype).to(tl.float32)
    crossed = (there.to(tl.float32) * sin.to(tl.float32)).to(dtype).to(tl.float32)
    return straight, crossed


@triton.jit
def _stored(target, value, mask, LARGEST: tl.constexpr):
    """Write to the cache, clamped to its dtype."""
    if LARGEST is not None:
        value = tl.clamp(value.to(tl.float32), -LARGEST, LARGEST)
    tl.store(target, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def rotate_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    slot_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    column = tl.arange(0, COLUMNS)
    in_half = column < HALF
    # One row, but read for each head: in the layout of the heads, it need not be passed between threads.
    angle = tl.zeros((HEADS, 1), tl.int32) + column[None, :]
    cos_row = cos_ptr + token * cos_stride + angle
    sin_row = sin_ptr + token * sin_stride + angle
    cos_1 = tl.load(cos_row, mask=in_half[None, :], other=0.0)
    cos_2 = tl.load(cos_row + HALF, mask=in_half[None, :], other=0.0)
    sin_1 = tl.load(sin_row, mask=in_half[None, :], other=0.0)
    sin_2 = tl.load(sin_row + HALF, mask=in_half[None, :], other=0.0)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        mask = (head < Q_HEADS)[:, None] & in_half[None, :]
        q = q_ptr + token * q_token_stride + head[:, None].to(tl.int64) * q_head_stride + column[None, :]
        q_1 = tl.load(q, mask=mask, other=0.0)
        q_2 = tl.load(q + HALF, mask=mask, other=0.0)
        straight, crossed = _turned(q_1, q_2, cos_1, sin_1)
        tl.store(q, (straight - crossed).to(q_1.dtype), mask=mask)
        straight, crossed = _turned(q_2, q_1, cos_2, sin_2)
        tl.store(q + HALF, (straight + crossed).to(q_1.dtype), mask=mask)
    else:
        slot = tl.load(slot_ptr + token)
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        written = (head < tl.where(slot >= 0, KV_HEADS, 0))[:, None]
        mask = written & in_half[None, :]
        k = k_ptr + token * k_token_stride + head[:, None].to(tl.int64) * k_head_stride
        cell = slot // BLOCK_SIZE * (2 * KV_HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE
        target = cache_ptr + cell * HEAD_DIM + (head * (BLOCK_SIZE * HEAD_DIM))[:, None]
        k_1 = tl.load(k + column[None, :], mask=mask, other=0.0)
        k_2 = tl.load(k + HALF + column[None, :], mask=mask, other=0.0)
        straight, crossed = _turned(k_1, k_2, cos_1, sin_1)
        _stored(target + column[None, :], (straight - crossed).to(k_1.dtype), mask, LARGEST)
        straight, crossed = _turned(k_2, k_1, cos_2, sin_2)
        _stored(target + HALF + column[None, :], (straight + crossed).to(k_1.dtype), mask, LARGEST)
        if REST:
            rest = 2 * HALF + tl.arange(0, REST)
            in_rest = written & (rest < HEAD_DIM)[None, :]
            passed = tl.load(k + rest[None, :], mask=in_rest, other=0.0)
            _stored(target + rest[None, :], passed, in_rest, LARGEST)
        value = tl.arange(0, VALUES)
        in_head = written & (value < HEAD_DIM)[None, :]
        v = v_ptr + token * v_token_stride + head[:, None].to(tl.int64) * v_head_stride + value[None, :]
        target += KV_HEADS * BLOCK_SIZE * HEAD_DIM
        _stored(target + value[None, :], tl.load(v, mask=in_head, other=0.0), in_head, LARGEST)
