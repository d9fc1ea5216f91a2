"""The launch of the attention kernels, by the tiles that `plan` cut the step into."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.attention.kernel import attend_kernel, merge_kernel, write_kernel
from loraplex_kernels.attention.plan import TilePlan
from loraplex_kernels.attention.tiles import column_block
from loraplex_kernels.strides import contiguous_rows

# The interpreter multiplies bfloat16 wrongly; the same products in float32 are exact.
_UPCAST = dispatch.interpreting()

_LOG2_E = 1.4426950408889634

_LEAST_SCALE = 1e-30
"""In place of a scale of zero, which would turn the -inf of a hidden key into NaN."""

MERGE_ROWS = 8
"""Rows of a program of the merge: with heads of 128, 8 elements for each of 128 threads."""

_WRITE_ELEMENTS = 4096
"""Elements of keys in a program of the write: 32 for each of 128 threads."""


def write_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Launch the write of k and v ``[T, Hkv, D]`` to `slots` int64 ``[T]``; a negative slot is skipped."""
    k, v = contiguous_rows(k), contiguous_rows(v)
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    columns = column_block(head_dim)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, _WRITE_ELEMENTS // columns))
    narrow = kv_cache.dtype.itemsize == 1
    write_kernel[(k.shape[0], triton.cdiv(num_kv_heads, heads))](
        k,
        v,
        kv_cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HEADS=heads,
        COLUMNS=columns,
        LARGEST=torch.finfo(kv_cache.dtype).max if narrow else None,
        num_warps=4,
    )
    dispatch.count("attention.write", "triton")


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    blocks: Tensor,
    plan: TilePlan,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Launch the attention of q ``[T, Hq, D]`` over the block tables `blocks` (int32), as `plan` cuts it."""
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, _LEAST_SCALE)
    q = contiguous_rows(q)
    num_heads = q.shape[1]
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    group, tiles = num_heads // num_kv_heads, plan.tiles
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (plan.num_planes, num_kv_heads, tiles.rows)
    planes = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    common = {"GROUP": group, "KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim}
    columns = column_block(head_dim)
    attend_kernel[(plan.num_tiles, num_kv_heads)](
        q,
        kv_cache,
        blocks,
        plan.tile,
        out,
        planes,
        weights,
        q.stride(0),
        q.stride(1),
        0 if sliding_window is None else sliding_window,
        scale * _LOG2_E if softcap is None else scale * _LOG2_E * 2 / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        **common,
        BLOCK_SIZE=block_size,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        COLUMNS=columns,
        WINDOW=sliding_window is not None,
        SOFTCAP=softcap is not None,
        PHASES=tiles.phases,
        UPCAST=_UPCAST,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    dispatch.count("attention", "triton")
    if plan.num_merges:
        merge_kernel[(plan.num_merges, num_kv_heads, triton.cdiv(tiles.rows, MERGE_ROWS))](
            plan.merge,
            planes,
            weights,
            out,
            **common,
            TILE_ROWS=tiles.rows,
            ROWS=MERGE_ROWS,
            COLUMNS=columns,
            num_warps=4,
        )
        dispatch.count("attention.merge", "triton")
    return out
