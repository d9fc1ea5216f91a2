"""The launch of rotation and write."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.attention.rotary.kernel import rotate_write_kernel
from loraplex_kernels.strides import contiguous_rows

_ELEMENTS = 1024
"""Elements of one half of a program's heads: 16 bytes of half precision for each thread of four warps."""


def constants(num_heads: int, num_kv_heads: int, head_dim: int, rotary: int) -> dict[str, int]:
    """The kernel's constants for heads of this number and width, rotated in their first `rotary` values."""
    columns = triton.next_power_of_2(max(rotary // 2, 1))
    rest = head_dim - rotary
    return {
        "Q_HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": rotary // 2,
        "HEADS": min(triton.next_power_of_2(num_heads), max(1, _ELEMENTS // columns)),
        "COLUMNS": columns,
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "VALUES": triton.next_power_of_2(head_dim),
    }


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor
) -> None:
    """Launch the rotation of q and k, and the write of k and v to `slots` int64 ``[T]``, none if negative."""
    if q.stride(-1) != 1:
        raise ValueError(f"q is rotated in place: its heads must be contiguous, not of strides {q.stride()}")
    k, v, cos, sin = (contiguous_rows(each) for each in (k, v, cos, sin))
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    found = constants(q.shape[1], num_kv_heads, head_dim, cos.shape[1])
    blocks = triton.cdiv(q.shape[1], found["HEADS"]) + triton.cdiv(num_kv_heads, found["HEADS"])
    narrow = kv_cache.dtype.itemsize == 1
    rotate_write_kernel[(q.shape[0], blocks)](
        q,
        k,
        v,
        cos,
        sin,
        kv_cache,
        slots,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        **found,
        BLOCK_SIZE=block_size,
        LARGEST=torch.finfo(kv_cache.dtype).max if narrow else None,
        num_warps=4,
    )
    dispatch.count("rotary.write", "triton")
