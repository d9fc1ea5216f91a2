"""A pool of adapters with random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.pool import ALIGNMENT, EntryShape, LoraPool, adapter_layout, extent_alignment


def random_pool(
    entries: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scaled: bool = False,
    max_rank: int | None = None,
) -> LoraPool:
    """One adapter of each of `ranks` in a slot of its own, on every entry.

    Args:
        entries: (input width, output width) of each entry of the model.
        scaled: adapters in 8 bits; their values are then random bytes, with steps that keep them small.
        max_rank: the largest that may be bound; default: the largest of `ranks`.
    """
    alignment = ALIGNMENT if scaled else extent_alignment({width for entry in entries for width in entry})
    layouts = [
        adapter_layout(
            [EntryShape(index, *widths, rank) for index, widths in enumerate(entries)],
            alignment,
            scaled=scaled,
        )
        for rank in ranks
    ]
    starts, end = [], 0
    for layout in layouts:
        starts.append(end)
        end += -(-layout.num_elements // alignment) * alignment
    pool = LoraPool.allocate(
        num_elements=end,
        num_slots=len(ranks),
        num_entries=len(entries),
        dtype=dtype,
        device=device,
        max_rank=max_rank or max(ranks),
        scaled=scaled,
    )
    if scaled:
        pool.arena.random_(-127, 128)
    else:
        pool.arena.normal_(std=0.02)
    for slot, (start, layout) in enumerate(zip(starts, layouts, strict=True)):
        pool.bind(slot, start, layout)
        for adapted, offset in zip(layout.entries, layout.scale_offset, strict=False):
            scales = pool.arena[start + offset : start + offset + 4 * adapted.rank_padded]
            scales.view(torch.float32).fill_(1e-6)
    return pool
