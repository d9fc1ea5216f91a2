"""Triton kernels of paged ragged attention.

write    grid (token, block of key heads). Copies a token's keys and values to its cell.
attend   grid (tile, key head). A tile is up to `ROWS` rows of one sequence, a row being one query of one of
         the query heads that share the key head, so each key is read once for all of them. It walks a range
         of keys through the block table with a running softmax in base 2. A tile that has all its keys to
         itself writes the result; parts of a divided tile write planes: unscaled sums, maxima and weights.
merge    grid (divided tile, key head, block of rows). Adds the planes up, in order and without atomics.

The host computes the tiles (`plan`). Keys outside a tile's range are not read, so the content of other cells
does not matter. Where a tile's queries see all keys of a block, nothing is masked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_kernels.attention.plan import MERGE_FIELDS, TILE_FIELDS

_TILE_FIELDS = tl.constexpr(TILE_FIELDS)
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    cache_ptr,
    slot_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    mask = (head < KV_HEADS)[:, None] & (column < HEAD_DIM)[None, :]
    k_source = k_ptr + token * k_token_stride + head[:, None].to(tl.int64) * k_head_stride + column[None, :]
    v_source = v_ptr + token * v_token_stride + head[:, None].to(tl.int64) * v_head_stride + column[None, :]
    k = tl.load(k_source, mask=mask, other=0.0)
    v = tl.load(v_source, mask=mask, other=0.0)
    if LARGEST is not None:
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    block = slot // BLOCK_SIZE
    cell = block * (2 * KV_HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE
    target = cache_ptr + cell * HEAD_DIM + (head * (BLOCK_SIZE * HEAD_DIM))[:, None] + column[None, :]
    tl.store(target, k.to(cache_ptr.dtype.element_ty), mask=mask)
    target += KV_HEADS * BLOCK_SIZE * HEAD_DIM
    tl.store(target, v.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend_keys(
    acc,
    total,
    peak,
    q,
    first,
    last,
    end,
    position,
    heads_ptr,
    table_ptr,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The running softmax over keys first : last, by blocks of KEYS; none from `end` on is read."""
    column = tl.arange(0, COLUMNS)
    key = first + tl.arange(0, KEYS)
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0)
    for begin in tl.range(first, last, KEYS):
        key = begin + tl.arange(0, KEYS)
        cell = block.to(tl.int64) * (2 * KV_HEADS * BLOCK_SIZE) + key % BLOCK_SIZE
        k_block = heads_ptr + (cell * HEAD_DIM)[:, None] + column[None, :]
        v_block = k_block + KV_HEADS * BLOCK_SIZE * HEAD_DIM
        # One block of keys ahead: the reads of k and v then wait for no other, and can be prefetched.
        block = tl.load(table_ptr + (key + KEYS) // BLOCK_SIZE, mask=key + KEYS < end, other=0)
        if MASKED and HEAD_DIM != COLUMNS:
            mask = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
            k = tl.load(k_block, mask=mask, other=0.0)
            v = tl.load(v_block, mask=mask, other=0.0)
        elif MASKED:
            k = tl.load(k_block, mask=(key < end)[:, None], other=0.0)
            v = tl.load(v_block, mask=(key < end)[:, None], other=0.0)
        elif HEAD_DIM != COLUMNS:
            k = tl.load(k_block, mask=(column < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_block, mask=(column < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_block)
            v = tl.load(v_block)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        if UPCAST:
            scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")

        # Exponents are of base 2 and `factor` > 0, so scores need no scaling before their maximum is known.
        factor = scale
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends; `scale` holds 2 log2(e) / softcap.
            scores = 1.0 - 2.0 / (tl.exp2(scores * scale) + 1.0)
            factor = softcap
        if MASKED:
            visible = key[None, :] <= tl.minimum(position, end - 1)[:, None]
            if WINDOW:
                visible &= key[None, :] > (position - window)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * factor)
        if MASKED:
            # A row may have seen no key yet.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            base = higher
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(scores * factor - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        rounded = weights.to(q.dtype)
        if UPCAST:
            acc = tl.dot(rounded.to(tl.float32), v.to(tl.float32), acc=acc, input_precision="ieee")
        else:
            acc = tl.dot(rounded, v, acc=acc, input_precision="ieee")
        peak = higher
    return acc, total, peak


# Triton would compile further variants for a window of 1 or of a multiple of 16; they are not needed.
@triton.jit(do_not_specialize=["window"])
def attend_kernel(
    q_ptr,
    cache_ptr,
    block_ptr,
    tile_ptr,
    out_ptr,
    plane_ptr,
    weight_ptr,
    q_token_stride,
    q_head_stride,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PHASES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tile_ptr + tl.program_id(0) * _TILE_FIELDS
    kv_head = tl.program_id(1)
    first_row = tl.load(tile)
    end_row = tl.load(tile + 1)
    if first_row >= end_row:
        return
    token_start = tl.load(tile + 2)
    table_start = tl.load(tile + 3)
    first_position = tl.load(tile + 4)
    begin = tl.load(tile + 5)
    end = tl.load(tile + 6)
    plane = tl.load(tile + 7)

    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    position = first_position + row // GROUP
    token = (token_start + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    mask = (row < end_row)[:, None] & (column < HEAD_DIM)[None, :]
    q_rows = q_ptr + token * q_token_stride + head.to(tl.int64) * q_head_stride
    q = tl.load(q_rows[:, None] + column[None, :], mask=mask, other=0.0)

    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    heads_ptr = cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table_ptr = block_ptr + table_start

    # Between `left` and `right` every row sees every key.
    left = begin
    right = begin
    if PHASES:
        if WINDOW:
            last_position = first_position + (end_row - 1) // GROUP
            hidden = tl.maximum(last_position - window + 1 - begin, 0)
            left = tl.minimum(begin + tl.cdiv(hidden, KEYS) * KEYS, end)
            acc, total, peak = _attend_keys(
                acc, total, peak, q, begin, left, end, position, heads_ptr, table_ptr, window, scale, softcap,
                KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, COLUMNS, WINDOW, SOFTCAP, True, UPCAST,
            )  # fmt: skip
        causal = tl.minimum(first_position + first_row // GROUP + 1, end)
        right = left + tl.maximum(causal - left, 0) // KEYS * KEYS
        acc, total, peak = _attend_keys(
            acc, total, peak, q, left, right, end, position, heads_ptr, table_ptr, window, scale, softcap,
            KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, COLUMNS, WINDOW, SOFTCAP, False, UPCAST,
        )  # fmt: skip
    acc, total, peak = _attend_keys(
        acc, total, peak, q, right, end, end, position, heads_ptr, table_ptr, window, scale, softcap,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, KEYS, COLUMNS, WINDOW, SOFTCAP, True, UPCAST,
    )  # fmt: skip

    if plane < 0:
        # Rows that stand for no sequence have no keys; they come out as zeros.
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        out_rows = out_ptr + (token * (KV_HEADS * GROUP) + head) * HEAD_DIM
        tl.store(out_rows[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        plane_row = (plane * KV_HEADS + kv_head).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(plane_ptr + (plane_row * HEAD_DIM)[:, None] + column[None, :], acc, mask=mask)
        tl.store(weight_ptr + plane_row * 2, peak, mask=row < end_row)
        tl.store(weight_ptr + plane_row * 2 + 1, total, mask=row < end_row)


@triton.jit
def merge_kernel(
    merge_ptr,
    plane_ptr,
    weight_ptr,
    out_ptr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    merge = merge_ptr + tl.program_id(0) * _MERGE_FIELDS
    kv_head = tl.program_id(1)
    lane = tl.program_id(2) * ROWS
    row_start = tl.load(merge)
    first_row = row_start + lane
    end_row = tl.load(merge + 1)
    if first_row >= end_row:
        return
    token_start = tl.load(merge + 2)
    first_plane = tl.load(merge + 3)
    end_plane = tl.load(merge + 4)

    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row_mask = row < end_row
    mask = row_mask[:, None] & (column < HEAD_DIM)[None, :]
    tile_row = lane + tl.arange(0, ROWS)

    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for plane in tl.range(first_plane, end_plane):
        plane_row = (plane * KV_HEADS + kv_head).to(tl.int64) * TILE_ROWS + tile_row
        peak = tl.maximum(peak, tl.load(weight_ptr + plane_row * 2, mask=row_mask, other=0.0))
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for plane in tl.range(first_plane, end_plane, num_stages=3):
        plane_row = (plane * KV_HEADS + kv_head).to(tl.int64) * TILE_ROWS + tile_row
        weight = tl.exp2(tl.load(weight_ptr + plane_row * 2, mask=row_mask, other=0.0) - peak)
        total += weight * tl.load(weight_ptr + plane_row * 2 + 1, mask=row_mask, other=1.0)
        part = tl.load(plane_ptr + (plane_row * HEAD_DIM)[:, None] + column[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * part
    acc = acc / total[:, None]
    token = (token_start + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    out_rows = out_ptr + (token * (KV_HEADS * GROUP) + head) * HEAD_DIM
    tl.store(out_rows[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
