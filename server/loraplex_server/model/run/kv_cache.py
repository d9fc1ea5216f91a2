"""The KV cache of all layers: its dtype, its size and its allocation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.attention import kv_cache_shape
from loraplex_server.config import SchedulerConfig


def kv_dtype(config: SchedulerConfig, dtype: torch.dtype) -> torch.dtype:
    """The cache's dtype for activations of `dtype`."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype


def block_bytes(kv_shapes: Sequence[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers.

    Args:
        kv_shapes: (KV heads, head dimension) of each layer.
        block_size: tokens per block.
    """
    return sum(2 * block_size * heads * width for heads, width in kv_shapes) * dtype.itemsize


def allocate_kv(
    kv_shapes: Sequence[tuple[int, int]],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """One cache per layer, zeroed: [num_blocks, 2, num_kv_heads, block_size, head_dim] (`kv_cache_shape`).

    Operating systems provide memory when it is first written. Writing zeros makes a lack of memory show now,
    not in the middle of serving.
    """
    return tuple(
        torch.empty(kv_cache_shape(num_blocks, block_size, heads, width), dtype=dtype, device=device).zero_()
        for heads, width in kv_shapes
    )
