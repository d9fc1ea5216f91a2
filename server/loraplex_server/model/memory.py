"""From bytes to KV blocks: plain arithmetic, done once at start."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from loraplex_kernels.attention import kv_cache_shape
from loraplex_server.config import SchedulerConfig
from loraplex_server.errors import FailedPreconditionError

# Tokens per request that the CPU default provides for: room to serve, without taking the machine.
_DEFAULT_TOKENS_PER_REQUEST = 512
_CPU_SHARE = 0.25
_GPU_SHARE = 0.85


def block_bytes(kv_shapes: Sequence[tuple[int, int]], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return sum(2 * block_size * heads * width for heads, width in kv_shapes) * dtype.itemsize


def num_kv_blocks(config: SchedulerConfig, per_block: int, max_model_len: int, device: torch.device) -> int:
    """How many blocks the cache has: what `kv_cache_bytes` holds, or a default of the free memory.

    Raises:
        FailedPreconditionError: not even one request of moderate length would fit.
    """
    size = config.kv_block_size
    if config.kv_cache_bytes:
        blocks = config.kv_cache_bytes // per_block
    elif device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        blocks = int(free * _GPU_SHARE) // per_block
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        tokens = config.max_num_requests * min(max_model_len, _DEFAULT_TOKENS_PER_REQUEST)
        wanted = max(tokens, max_model_len) // size + config.max_num_requests
        blocks = min(wanted, int(free * _CPU_SHARE) // per_block)
    if blocks < 2:
        raise FailedPreconditionError(
            f"the KV cache has room for {blocks} blocks of {size} tokens ({per_block} bytes each); "
            "give --kv-cache-bytes more, or free memory"
        )
    return blocks


def allocate_kv(
    kv_shapes: Sequence[tuple[int, int]],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """One cache a layer, of the attention op's `kv_cache_shape`."""
    return tuple(
        torch.zeros(kv_cache_shape(num_blocks, block_size, heads, width), dtype=dtype, device=device)
        for heads, width in kv_shapes
    )
