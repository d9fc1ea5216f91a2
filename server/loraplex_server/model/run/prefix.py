"""Prefix tuning (Li and Liang, 2021): an adapter's own keys and values, copied to the KV cache."""

from __future__ import annotations

import torch

from loraplex_kernels import vectors
from loraplex_kernels.attention import write_cells
from loraplex_kernels.pool import LoraPool
from loraplex_server.core.step import StepPlan


def place_prefixes(plan: StepPlan, pool: LoraPool, kv_caches: tuple[torch.Tensor, ...]) -> None:
    """Copies the plan's prefixes from the pool to the KV caches on the device.

    Keys are copied as they are, without a position embedding, as in PEFT.

    Args:
        kv_caches: one per layer, [num_blocks, 2, num_kv_heads, block_size, head_dim].
    """
    if not len(plan.prefix_slot):
        return
    cells = torch.from_numpy(plan.prefix_cells).to(kv_caches[0].device)
    _, _, num_kv_heads, _, head_dim = kv_caches[0].shape
    bounds = zip(plan.prefix_slot.tolist(), plan.prefix_first.tolist(), strict=True)
    for index, (slot, first) in enumerate(bounds):
        start, end = plan.prefix_start[index : index + 2].tolist()
        tokens = range(first, first + end - start)
        prefix = vectors.prefix(pool, slot, tokens, len(kv_caches), num_kv_heads, head_dim)
        for (keys, values), cache in zip(prefix, kv_caches, strict=True):
            write_cells(keys, values, cache, cells[start:end])
