"""Triton kernels of the LoRA op, and their launch.

shrink   grid (tile of pairs, slice, plane). A tile holds pairs of one slot, so a program multiplies rows of x
         with one adapter's A; a plane is a part of the inner dimension, written apart, so no sum crosses
         programs and nothing needs zeroing first.
expand   grid (tile of rows, block of columns of all slices). A tile holds rows of one composition; a program
         adds its members one after the other, in blocks of rank rows, summing h over the planes as it loads.

Both loop to the true rank: rows past it are neither read nor multiplied into anything that is kept. Grids are
known on the host from the batch's buffers, and neutral tiles leave at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.lora import tiles
from loraplex_kernels.lora.layouts import ALIGNMENT, MAX_SLICES, LoraPool, LoraSite
from loraplex_kernels.lora.segments import LoraBatch

# The interpreter multiplies bfloat16 wrongly; the same products in float32 are exact.
_UPCAST = dispatch.interpreting()

# Blocks of the arena begin at multiples of this: known to the compiler, rows load in 16-byte pieces.
_ALIGNMENT = tl.constexpr(ALIGNMENT)

# Arguments whose divisibility would only multiply the variants to compile.
_PLAIN = ["num_entries", "first_entry", "h_pair_stride"]


@triton.jit(do_not_specialize=_PLAIN)
def shrink_kernel(
    x_ptr,
    arena_ptr,
    a_offset_ptr,
    rank_ptr,
    pair_token_ptr,
    tile_ptr,
    h_ptr,
    x_stride,
    in_features,
    num_entries,
    first_entry,
    h_pair_stride,
    H_PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    slice_index = tl.program_id(1)
    plane = tl.program_id(2)
    slot = tl.load(tile_ptr + tile * 3)
    if slot < 0:
        return
    first_pair = tl.load(tile_ptr + tile * 3 + 1)
    end_pair = tl.load(tile_ptr + tile * 3 + 2)
    entry = slot.to(tl.int64) * num_entries + first_entry + slice_index
    rank = tl.load(rank_ptr + entry)
    a_offset = tl.multiple_of(tl.load(a_offset_ptr + entry), _ALIGNMENT)

    pair = first_pair + tl.arange(0, ROWS)
    pair_mask = pair < end_pair
    token = tl.load(pair_token_ptr + pair, mask=pair_mask, other=0).to(tl.int64)
    k_lane = tl.arange(0, K_BLOCK)
    k_span = tl.cdiv(tl.cdiv(in_features, K_BLOCK), tl.num_programs(2)) * K_BLOCK
    k_first = plane * k_span
    k_end = tl.minimum(k_first + k_span, in_features)
    x_rows = x_ptr + token[:, None] * x_stride

    for rank_first in range(0, rank, RANK_BLOCK):
        rank_row = rank_first + tl.arange(0, RANK_BLOCK)
        rank_mask = rank_row < rank
        a_rows = arena_ptr + a_offset + rank_row[None, :].to(tl.int64) * in_features
        h = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
        for k_block in range(k_first, k_end, K_BLOCK):
            k = k_block + k_lane
            x = tl.load(x_rows + k[None, :], mask=pair_mask[:, None] & (k < k_end)[None, :], other=0.0)
            a = tl.load(a_rows + k[:, None], mask=rank_mask[None, :] & (k < k_end)[:, None], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                a = a.to(tl.float32)
            h = tl.dot(x, a, acc=h, input_precision="ieee")
        h_rows = h_ptr + pair[:, None].to(tl.int64) * h_pair_stride
        h_column = (slice_index * tl.num_programs(2) + plane) * H_PITCH + rank_row
        tl.store(h_rows + h_column[None, :], h, mask=pair_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=_PLAIN)
def expand_kernel(
    h_ptr,
    arena_ptr,
    b_offset_ptr,
    rank_ptr,
    pair_weight_ptr,
    group_token_ptr,
    tile_ptr,
    member_ptr,
    y_ptr,
    y_stride,
    column_0,
    width_0,
    column_1,
    width_1,
    column_2,
    width_2,
    column_3,
    width_3,
    num_entries,
    first_entry,
    h_pair_stride,
    H_PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    first_row = tl.load(tile_ptr + tile * 4)
    end_row = tl.load(tile_ptr + tile * 4 + 1)
    if first_row >= end_row:
        return
    first_member = tl.load(tile_ptr + tile * 4 + 2)
    end_member = tl.load(tile_ptr + tile * 4 + 3)

    # Blocks are counted through the slices: find the slice, and the block's place in it.
    block = tl.program_id(1)
    end_0 = tl.cdiv(width_0, COLUMN_BLOCK)
    end_1 = end_0 + tl.cdiv(width_1, COLUMN_BLOCK)
    end_2 = end_1 + tl.cdiv(width_2, COLUMN_BLOCK)
    slice_index = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
    slice_index += (block >= end_2).to(tl.int32)
    first_block = tl.where(block >= end_0, end_0, 0)
    first_block = tl.where(block >= end_1, end_1, first_block)
    first_block = tl.where(block >= end_2, end_2, first_block)
    width = tl.where(slice_index == 0, width_0, tl.where(slice_index == 1, width_1, width_2))
    width = tl.where(slice_index == 3, width_3, width)
    first_column = tl.where(slice_index == 0, column_0, tl.where(slice_index == 1, column_1, column_2))
    first_column = tl.where(slice_index == 3, column_3, first_column)

    row = first_row + tl.arange(0, ROWS)
    row_mask = row < end_row
    column = (block - first_block) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < width
    token = tl.load(group_token_ptr + row, mask=row_mask, other=0).to(tl.int64)
    y_block = y_ptr + token[:, None] * y_stride + first_column + column[None, :]
    y_mask = row_mask[:, None] & column_mask[None, :]
    y = tl.load(y_block, mask=y_mask, other=0.0)

    delta = tl.zeros((ROWS, COLUMN_BLOCK), dtype=tl.float32)
    total_rank = 0
    for member in range(first_member, end_member):
        slot = tl.load(member_ptr + member * 2)
        pair = row + tl.load(member_ptr + member * 2 + 1)
        entry = slot.to(tl.int64) * num_entries + first_entry + slice_index
        rank = tl.load(rank_ptr + entry)
        b_offset = tl.multiple_of(tl.load(b_offset_ptr + entry), _ALIGNMENT)
        weight = tl.load(pair_weight_ptr + pair, mask=row_mask, other=0.0)
        h_rows = h_ptr + pair[:, None].to(tl.int64) * h_pair_stride + slice_index * (PLANES * H_PITCH)
        total_rank += rank
        for rank_first in range(0, rank, RANK_BLOCK):
            rank_row = rank_first + tl.arange(0, RANK_BLOCK)
            rank_mask = rank_row < rank
            b_block = arena_ptr + b_offset + rank_row[:, None].to(tl.int64) * width + column[None, :]
            b = tl.load(b_block, mask=rank_mask[:, None] & column_mask[None, :], other=0.0)
            # With a pitch known to the compiler, all planes of a row share one address register.
            h = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
            for plane in tl.static_range(PLANES):
                h_block = h_rows + (plane * H_PITCH + rank_row[None, :])
                h += tl.load(h_block, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
            h = (h * weight[:, None]).to(b.dtype)
            if UPCAST:
                h = h.to(tl.float32)
                b = b.to(tl.float32)
            delta = tl.dot(h, b, acc=delta, input_precision="ieee")

    # Where no member touches this slice, y keeps its bits (a sum with zero would turn -0 into 0).
    if total_rank > 0:
        tl.store(y_block, (y.to(tl.float32) + delta).to(y.dtype), mask=y_mask)


def shrink(x: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> Tensor:
    """Launch the shrink for all slices: h is float32 ``[pair_rows, num_slices, planes, max_rank]``."""
    config = tiles.choose(batch.tile_rows, x.dtype)
    planes = tiles.planes(batch.tile_rows, batch.pair_rows, site.in_features)
    shape = (batch.pair_rows, site.num_slices, planes, pool.max_rank)
    h = torch.empty(shape, dtype=torch.float32, device=x.device)
    shrink_kernel[(batch.shrink_tiles, site.num_slices, planes)](
        x,
        pool.arena,
        pool.a_offset,
        pool.rank,
        batch.pair_token,
        batch.shrink_tile,
        h,
        x.stride(0),
        site.in_features,
        pool.num_entries,
        site.first_entry,
        h.stride(0),
        H_PITCH=pool.max_rank,
        ROWS=config.rows,
        RANK_BLOCK=config.shrink_rank,
        K_BLOCK=config.shrink_k,
        UPCAST=_UPCAST,
        num_warps=config.shrink_warps,
        num_stages=config.shrink_stages,
    )
    return h


def expand(h: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, y: Tensor) -> None:
    """Launch the expand for all slices of `site`, in place on y."""
    config = tiles.choose(batch.tile_rows, y.dtype)
    columns = [bound for slice_ in site.slices for bound in slice_]
    columns += [0] * (2 * (MAX_SLICES - site.num_slices))
    blocks = sum(triton.cdiv(width, config.expand_columns) for _, width in site.slices)
    expand_kernel[(batch.expand_tiles, blocks)](
        h,
        pool.arena,
        pool.b_offset,
        pool.rank,
        batch.pair_weight,
        batch.group_token,
        batch.expand_tile,
        batch.member,
        y,
        y.stride(0),
        *columns,
        pool.num_entries,
        site.first_entry,
        h.stride(0),
        H_PITCH=pool.max_rank,
        ROWS=config.rows,
        RANK_BLOCK=config.expand_rank,
        COLUMN_BLOCK=config.expand_columns,
        PLANES=h.shape[2],
        UPCAST=_UPCAST,
        num_warps=config.expand_warps,
        num_stages=config.expand_stages,
    )
