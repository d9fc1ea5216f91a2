"""Triton kernels of the LoRA op; `launch` starts them.

shrink_decode   grid (tile of pairs, slice, plane). A tile holds pairs of one slot, so a program multiplies
                rows of x with one adapter's A; a plane is a part of the inner dimension, written apart, so
                no sum crosses programs and nothing needs zeroing first.
shrink_stacked  grid (tile of pairs, plane). For tiles of many rows: the A of all slices stand side by side as
                one matrix of the summed ranks, so x is read once for the whole site.
expand          grid (tile of rows, block of columns of all slices). A tile holds rows of one group; a
                program adds its members one after the other, in blocks of rank rows, summing h over the
                planes as it loads.

A few rows are matrix-vector products: they stream the adapter through registers in 16-byte pieces and use no
tensor core; tiles of more rows do. Both stop at the true rank: rows past it are neither read nor multiplied
into anything that is kept. Grids are known on the host from the batch's buffers, and neutral tiles leave at
once.

With programmatic dependent launch (`PDL`) a kernel starts while the one before it drains. What it reads
before `gdc_wait` are the step's metadata and the adapters, which no kernel of the step writes; x, h and y
come after. Every program waits, neutral ones too: a finished kernel means that all before it have finished.

Adapters in 8 bits (`SCALED`): A and B are int8, and the product of a rank row's two scales is applied to h.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loraplex_kernels.pool import ALIGNMENT

# Blocks of the arena begin at multiples of this: known to the compiler, rows load in 16-byte pieces.
_ALIGNMENT = tl.constexpr(ALIGNMENT)

# Arguments whose divisibility would only multiply the variants to compile.
_PLAIN = ["num_entries", "first_entry", "num_slices"]


@triton.jit
def _dot(left, right, acc, UPCAST: tl.constexpr):
    """``acc + left @ right``, in the type of `left`."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    else:
        right = right.to(left.dtype)
    return tl.dot(left, right, acc=acc, input_precision="ieee")


@triton.jit
def _widen(values, like, UPCAST: tl.constexpr):
    """float32 of adapter values; int8 goes through the compute dtype, to which a quick conversion exists."""
    if values.dtype == tl.int8 and not UPCAST:
        values = values.to(like.dtype.element_ty)
    return values.to(tl.float32)


@triton.jit
def _plane_range(in_features, plane, planes, K_STEP: tl.constexpr):
    """Begin and end of the plane's part of the inner dimension: parts are multiples of `K_STEP`."""
    span = tl.cdiv(tl.cdiv(in_features, K_STEP), planes) * K_STEP
    first = plane * span
    return first, tl.minimum(first + span, in_features)


@triton.jit
def _padded(rank, RANK_ALIGN: tl.constexpr):
    """The rows that a rank takes in the arena."""
    return tl.cdiv(rank, RANK_ALIGN) * RANK_ALIGN


@triton.jit
def _shrink_tile(
    x_rows,
    a_rows,
    pair_mask,
    rank_mask,
    k_first,
    k_end,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``x[rows, k_first:k_end] @ A[ranks, k_first:k_end].T`` on tensor cores: float32 ``[ROWS, RANK_BLOCK]``.

    x_rows ``[ROWS, 1]`` and a_rows ``[1, RANK_BLOCK]`` point to the rows' beginnings.
    """
    k_lane = tl.arange(0, K_BLOCK)
    h = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
    for k_block in range(k_first, k_end, K_BLOCK):
        k = k_block + k_lane
        x_mask, a_mask = pair_mask[:, None], rank_mask[None, :]
        if not EVEN:
            x_mask = x_mask & (k < k_end)[None, :]
            a_mask = a_mask & (k < k_end)[:, None]
        x = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
        a = tl.load(a_rows + k[:, None], mask=a_mask, other=0.0)
        h = _dot(x, a, h, UPCAST)
    return h


@triton.jit
def _shrink_row(
    x_row,
    a_ptr,
    h_row,
    in_features,
    rank,
    rank_padded,
    k_first,
    k_end,
    RANK_BLOCK: tl.constexpr,
    VECTOR_K: tl.constexpr,
    LANE: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``x[k_first:k_end] @ A[:, k_first:k_end].T`` of one pair, through registers, written to h_row."""
    lane = tl.arange(0, VECTOR_K)
    for rank_first in range(0, rank, RANK_BLOCK):
        rank_row = rank_first + tl.arange(0, RANK_BLOCK)
        a_rows = a_ptr + rank_row[:, None] * in_features
        partial = tl.zeros((RANK_BLOCK, VECTOR_K // LANE), dtype=tl.float32)
        for k_block in range(k_first, k_end, VECTOR_K):
            k = k_block + lane
            mask = (rank_row < rank)[:, None]
            if not EVEN:
                mask = mask & (k < k_end)[None, :]
            a = tl.load(a_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            if PDL:
                gdc_wait()
            if EVEN:
                x = tl.load(x_row + k)
            else:
                x = tl.load(x_row + k, mask=k < k_end, other=0.0)
            product = _widen(a, x_row, UPCAST) * x.to(tl.float32)[None, :]
            product = tl.reshape(product, (RANK_BLOCK, VECTOR_K // LANE, LANE))
            partial += tl.sum(product, axis=2)
        # A plane past the end read nothing, and its zeros must not come early either.
        if PDL:
            gdc_wait()
        tl.store(h_row + rank_row, tl.sum(partial, axis=1), mask=rank_row < rank_padded)


@triton.jit(do_not_specialize=_PLAIN)
def shrink_decode_kernel(
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
    H_PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_STEP: tl.constexpr,
    VECTOR_K: tl.constexpr,
    VECTOR_ROWS: tl.constexpr,
    LANE: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    slice_index = tl.program_id(1)
    plane = tl.program_id(2)
    slot = tl.load(tile_ptr + tile * 3)
    if slot < 0:
        if PDL:
            gdc_wait()
        return
    first_pair = tl.load(tile_ptr + tile * 3 + 1)
    end_pair = tl.load(tile_ptr + tile * 3 + 2)
    entry = slot.to(tl.int64) * num_entries + first_entry + slice_index
    rank = tl.load(rank_ptr + entry)
    a_ptr = arena_ptr + tl.multiple_of(tl.load(a_offset_ptr + entry), _ALIGNMENT)
    k_first, k_end = _plane_range(in_features, plane, tl.num_programs(2), K_STEP)
    # Columns up to the padded rank are written, zeros past the rank, so that the expand loads them in pieces.
    rank_padded = _padded(rank, RANK_ALIGN)
    h_pair_stride = tl.num_programs(1) * tl.num_programs(2) * H_PITCH
    h_tile = h_ptr + first_pair.to(tl.int64) * h_pair_stride
    h_tile += (slice_index * tl.num_programs(2) + plane) * H_PITCH

    if VECTOR_ROWS > 0:  # noqa: SIM102 - a condition of its own is decided by the compiler
        if end_pair - first_pair <= VECTOR_ROWS:
            for pair in range(first_pair, end_pair):
                x_row = x_ptr + tl.load(pair_token_ptr + pair).to(tl.int64) * x_stride
                h_row = h_tile + (pair - first_pair) * h_pair_stride
                _shrink_row(
                    x_row, a_ptr, h_row, in_features, rank, rank_padded, k_first, k_end,
                    RANK_BLOCK, VECTOR_K, LANE, EVEN, PDL, UPCAST,
                )  # fmt: skip
            if PDL:
                gdc_wait()
            return

    if PDL:
        gdc_wait()
    pair = first_pair + tl.arange(0, ROWS)
    pair_mask = pair < end_pair
    token = tl.load(pair_token_ptr + pair, mask=pair_mask, other=0).to(tl.int64)
    x_rows = x_ptr + token[:, None] * x_stride
    for rank_first in range(0, rank, RANK_BLOCK):
        rank_row = rank_first + tl.arange(0, RANK_BLOCK)
        rank_mask = rank_row < rank
        a_rows = a_ptr + rank_row[None, :] * in_features
        h = _shrink_tile(
            x_rows, a_rows, pair_mask, rank_mask, k_first, k_end, ROWS, RANK_BLOCK, K_BLOCK, EVEN, UPCAST
        )
        h_mask = pair_mask[:, None] & (rank_row < rank_padded)[None, :]
        tl.store(h_tile + tl.arange(0, ROWS)[:, None] * h_pair_stride + rank_row[None, :], h, mask=h_mask)


@triton.jit(do_not_specialize=_PLAIN)
def shrink_stacked_kernel(
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
    H_PITCH: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    K_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    plane = tl.program_id(1)
    planes = tl.num_programs(1)
    slot = tl.load(tile_ptr + tile * 3)
    if slot < 0:
        if PDL:
            gdc_wait()
        return
    first_pair = tl.load(tile_ptr + tile * 3 + 1)
    end_pair = tl.load(tile_ptr + tile * 3 + 2)
    entry = slot.to(tl.int64) * num_entries + first_entry
    total_rank = _padded(tl.load(rank_ptr + entry), RANK_ALIGN)
    for s in tl.static_range(1, SLICES):
        total_rank += _padded(tl.load(rank_ptr + entry + s), RANK_ALIGN)

    pair = first_pair + tl.arange(0, ROWS)
    pair_mask = pair < end_pair
    token = tl.load(pair_token_ptr + pair, mask=pair_mask, other=0).to(tl.int64)
    k_first, k_end = _plane_range(in_features, plane, planes, K_BLOCK)
    h_pair_stride = planes * (SLICES * H_PITCH)
    h_tile = h_ptr + first_pair.to(tl.int64) * h_pair_stride
    x_rows = x_ptr + token[:, None] * x_stride
    if PDL:
        gdc_wait()

    for first in range(0, total_rank, RANK_BLOCK):
        # A row of the stack is a rank row of the slice in whose range of summed padded ranks it lies; past
        # the rank it is a zero row of the arena.
        stacked = first + tl.arange(0, RANK_BLOCK)
        rank_row = stacked
        offset = tl.multiple_of(tl.load(a_offset_ptr + entry), _ALIGNMENT)
        h_column = tl.zeros((RANK_BLOCK,), dtype=tl.int32) + plane * H_PITCH
        end = _padded(tl.load(rank_ptr + entry), RANK_ALIGN)
        for s in tl.static_range(1, SLICES):
            beyond = stacked >= end
            rank_row = tl.where(beyond, stacked - end, rank_row)
            offset = tl.where(beyond, tl.load(a_offset_ptr + entry + s), offset)
            h_column = tl.where(beyond, (s * planes + plane) * H_PITCH, h_column)
            end += _padded(tl.load(rank_ptr + entry + s), RANK_ALIGN)
        if SLICES > 1:
            offset = tl.multiple_of(offset, _ALIGNMENT)
        mask = stacked < total_rank
        a_rows = arena_ptr + (offset + rank_row * in_features)[None, :]
        h = _shrink_tile(
            x_rows, a_rows, pair_mask, mask, k_first, k_end, ROWS, RANK_BLOCK, K_BLOCK, EVEN, UPCAST
        )
        h_rows = h_tile + tl.arange(0, ROWS)[:, None] * h_pair_stride
        tl.store(h_rows + (h_column + rank_row)[None, :], h, mask=pair_mask[:, None] & mask[None, :])


@triton.jit
def _load_h_row(
    h_row,
    scale_row,
    rank_row,
    rank,
    weight,
    H_PITCH: tl.constexpr,
    PLANES: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One pair's h at the rank rows `rank_row`, summed over the planes, weighted and scaled."""
    mask = rank_row < rank
    plane = tl.arange(0, PLANES)
    parts = tl.load(h_row + plane[:, None] * H_PITCH + rank_row[None, :], mask=mask[None, :], other=0.0)
    h = tl.sum(parts, axis=0) * weight
    if SCALED:
        h *= tl.load(scale_row + rank_row, mask=mask, other=0.0)
    return h


@triton.jit
def _slice_of(
    block,
    column_0,
    width_0,
    column_1,
    width_1,
    column_2,
    width_2,
    column_3,
    width_3,
    COLUMN_BLOCK: tl.constexpr,
):
    """The slice in which a block lies, blocks being counted through all slices: its index, its first column
    and width, and the block's first column in it.
    """
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
    return slice_index, first_column, width, (block - first_block) * COLUMN_BLOCK


@triton.jit
def _member_at(member_ptr, member, rank_ptr, b_offset_ptr, num_entries, entry_of_slice):
    """A member's adapter at the slice: what to add to a row to get its pair, its rank, and where B begins."""
    slot = tl.load(member_ptr + member * 2)
    shift = tl.load(member_ptr + member * 2 + 1)
    entry = slot.to(tl.int64) * num_entries + entry_of_slice
    rank = tl.load(rank_ptr + entry)
    return shift, rank, tl.multiple_of(tl.load(b_offset_ptr + entry), _ALIGNMENT)


@triton.jit
def _scales_of(scale_ptr, b_offset, rank, width, RANK_ALIGN: tl.constexpr):
    """Pointer to the float32 scales of an adapter, which follow the bytes of its B."""
    return scale_ptr + (b_offset + _padded(rank, RANK_ALIGN).to(tl.int64) * width) // 4


@triton.jit
def _expand_row(
    row,
    members,
    adapters,
    place,
    h_slice,
    h_pair_stride,
    pair_weight_ptr,
    group_token_ptr,
    y_ptr,
    y_stride,
    num_entries,
    entry_of_slice,
    H_PITCH: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add ``Σ weight · h @ B`` over the members to one row of y, through registers.

    members: their table, first and end. adapters: arena, scales, and the tables of offsets and ranks.
    place: the slice's first column in y, its width, and the block's first column in the slice.
    """
    member_ptr, first_member, end_member = members
    arena_ptr, scale_ptr, b_offset_ptr, rank_ptr = adapters
    first_column, width, block_column = place
    column = block_column + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < width
    delta = tl.zeros((COLUMN_BLOCK,), dtype=tl.float32)
    total_rank = 0
    for member in range(first_member, end_member):
        shift, rank, b_offset = _member_at(
            member_ptr, member, rank_ptr, b_offset_ptr, num_entries, entry_of_slice
        )
        pair = row + shift
        weight = tl.load(pair_weight_ptr + pair)
        h_row = h_slice + pair.to(tl.int64) * h_pair_stride
        total_rank += rank
        scale_row = scale_ptr
        if SCALED:
            scale_row = _scales_of(scale_ptr, b_offset, rank, width, RANK_ALIGN)
        for rank_first in range(0, rank, RANK_BLOCK):
            rank_row = rank_first + tl.arange(0, RANK_BLOCK)
            b_rows = arena_ptr + b_offset + rank_row[:, None] * width
            mask = (rank_row < rank)[:, None] & column_mask[None, :]
            b_block = b_rows + column[None, :]
            b = tl.load(b_block, mask=mask, other=0.0, eviction_policy="evict_first")
            if PDL:
                gdc_wait()
            h = _load_h_row(h_row, scale_row, rank_row, rank, weight, H_PITCH, PLANES, SCALED)
            delta += tl.sum(h[:, None] * _widen(b, y_ptr, UPCAST), axis=0)
    if PDL:
        gdc_wait()
    # Where no member touches this slice, y keeps its bits (a sum with zero would turn -0 into 0).
    if total_rank > 0:
        token = tl.load(group_token_ptr + row).to(tl.int64)
        y_row = y_ptr + token * y_stride + first_column + column
        y = tl.load(y_row, mask=column_mask, other=0.0)
        tl.store(y_row, (y.to(tl.float32) + delta).to(y.dtype), mask=column_mask)


@triton.jit
def _expand_tile(
    first_row,
    end_row,
    members,
    adapters,
    place,
    h_slice,
    h_pair_stride,
    pair_weight_ptr,
    group_token_ptr,
    y_ptr,
    y_stride,
    num_entries,
    entry_of_slice,
    H_PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add ``Σ weight · h @ B`` over the members to a tile of rows of y, on tensor cores.

    Arguments are those of `_expand_row`, for the rows ``first_row .. end_row``.
    """
    member_ptr, first_member, end_member = members
    arena_ptr, scale_ptr, b_offset_ptr, rank_ptr = adapters
    first_column, width, block_column = place
    row = first_row + tl.arange(0, ROWS)
    row_mask = row < end_row
    token = tl.load(group_token_ptr + row, mask=row_mask, other=0).to(tl.int64)
    y_rows = y_ptr + token[:, None] * y_stride + first_column
    for sub_block in range(block_column, tl.minimum(block_column + COLUMN_BLOCK, width), DOT_COLUMNS):
        column = sub_block + tl.arange(0, DOT_COLUMNS)
        column_mask = column < width
        y_mask = row_mask[:, None] & column_mask[None, :]
        y = tl.load(y_rows + column[None, :], mask=y_mask, other=0.0)
        delta = tl.zeros((ROWS, DOT_COLUMNS), dtype=tl.float32)
        total_rank = 0
        for member in range(first_member, end_member):
            shift, rank, b_offset = _member_at(
                member_ptr, member, rank_ptr, b_offset_ptr, num_entries, entry_of_slice
            )
            weight = tl.load(pair_weight_ptr + row + shift, mask=row_mask, other=0.0)
            h_tile = h_slice + (first_row + shift).to(tl.int64) * h_pair_stride
            h_rows = h_tile + tl.arange(0, ROWS)[:, None] * h_pair_stride
            rank_padded = _padded(rank, RANK_ALIGN)
            total_rank += rank
            for rank_first in range(0, rank, RANK_BLOCK):
                rank_row = rank_first + tl.arange(0, RANK_BLOCK)
                rank_mask = rank_row < rank
                b_rows = arena_ptr + b_offset + rank_row[:, None] * width
                b_mask = rank_mask[:, None] & column_mask[None, :]
                b = tl.load(b_rows + column[None, :], mask=b_mask, other=0.0)
                if SCALED:
                    # The select keeps the conversion ahead of the move into the tensor cores' layout, which
                    # has no quick way for bytes.
                    b = tl.where(rank_mask[:, None], b.to(tl.float32 if UPCAST else y.dtype), 0.0)
                h_mask = row_mask[:, None] & (rank_row < rank_padded)[None, :]
                h = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
                for plane in range(PLANES):
                    h += tl.load(h_rows + (plane * H_PITCH + rank_row[None, :]), mask=h_mask, other=0.0)
                h *= weight[:, None]
                if SCALED:
                    scale_row = _scales_of(scale_ptr, b_offset, rank, width, RANK_ALIGN)
                    h *= tl.load(scale_row + rank_row, mask=rank_mask, other=0.0)[None, :]
                delta = _dot(h.to(y.dtype), b, delta, UPCAST)
        if total_rank > 0:
            tl.store(y_rows + column[None, :], (y.to(tl.float32) + delta).to(y.dtype), mask=y_mask)


@triton.jit(do_not_specialize=_PLAIN)
def expand_kernel(
    h_ptr,
    arena_ptr,
    scale_ptr,
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
    num_slices,
    H_PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    RANK_ALIGN: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    VECTOR_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    first_row = tl.load(tile_ptr + tile * 4)
    end_row = tl.load(tile_ptr + tile * 4 + 1)
    if first_row >= end_row:
        if PDL:
            gdc_wait()
        return
    members = (member_ptr, tl.load(tile_ptr + tile * 4 + 2), tl.load(tile_ptr + tile * 4 + 3))
    adapters = (arena_ptr, scale_ptr, b_offset_ptr, rank_ptr)

    slice_index, first_column, width, block_column = _slice_of(
        tl.program_id(1),
        column_0,
        width_0,
        column_1,
        width_1,
        column_2,
        width_2,
        column_3,
        width_3,
        COLUMN_BLOCK,
    )
    place = (first_column, width, block_column)
    entry_of_slice = first_entry + slice_index
    h_slice = h_ptr + slice_index * (PLANES * H_PITCH)
    h_pair_stride = num_slices * (PLANES * H_PITCH)

    if VECTOR_ROWS > 0:  # noqa: SIM102 - a condition of its own is decided by the compiler
        if end_row - first_row <= VECTOR_ROWS:
            for row in range(first_row, end_row):
                _expand_row(
                    row, members, adapters, place, h_slice, h_pair_stride, pair_weight_ptr, group_token_ptr,
                    y_ptr, y_stride, num_entries, entry_of_slice,
                    H_PITCH, RANK_BLOCK, RANK_ALIGN, COLUMN_BLOCK, PLANES, SCALED, PDL, UPCAST,
                )  # fmt: skip
            return

    if PDL:
        gdc_wait()
    _expand_tile(
        first_row, end_row, members, adapters, place, h_slice, h_pair_stride, pair_weight_ptr,
        group_token_ptr, y_ptr, y_stride, num_entries, entry_of_slice,
        H_PITCH, ROWS, RANK_BLOCK, RANK_ALIGN, COLUMN_BLOCK, DOT_COLUMNS, PLANES, SCALED, UPCAST,
    )  # fmt: skip
