"""The KV cache of a layer: its shape, and the rows of a slot."""

from __future__ import annotations

import torch


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int, int]:
    """The shape of one layer's KV cache. In the dimension of size 2, keys come first."""
    return (num_blocks, 2, num_kv_heads, block_size, head_dim)


def head_cells(slots: torch.Tensor, block_size: int, num_kv_heads: int) -> torch.Tensor:
    """Slots [..., S] to the keys' rows [..., Hkv, S] of the cache seen as [table_rows, head_dim].

    The values' rows are block_size * Hkv further on.
    """
    heads = torch.arange(0, num_kv_heads * block_size, block_size, dtype=slots.dtype, device=slots.device)
    first_slot = slots - slots % block_size
    return (slots + first_slot * (2 * num_kv_heads - 1)).unsqueeze(-2) + heads.unsqueeze(1)
