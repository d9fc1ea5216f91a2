"""The KV cache of all layers: its type, its size, its memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.attention import kv_cache_shape
from loraplex_server.config import SchedulerConfig


def kv_dtype(config: SchedulerConfig, dtype: torch.dtype) -> torch.dtype:
    """The cache's type for activations of `dtype`."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype


def block_bytes(kv_shapes: Sequence[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return sum(2 * block_size * heads * width for heads, width in kv_shapes) * dtype.itemsize


def allocate_kv(
    kv_shapes: Sequence[tuple[int, int]],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """One cache a layer, of the attention op's `kv_cache_shape`; written, so that its memory is really there.

    Else a system that gives memory when it is first written might be found to have too little in mid-service.
    """
    return tuple(
        torch.empty(kv_cache_shape(num_blocks, block_size, heads, width), dtype=dtype, device=device).zero_()
        for heads, width in kv_shapes
    )
