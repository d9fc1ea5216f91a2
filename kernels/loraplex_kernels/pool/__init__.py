"""The adapters' memory on a device, which every op on adapters reads.

- `shapes`    sites of the model, and the shapes of an adapter's parameters there
- `layout`    the offset of each block of one adapter in its extent
- `tables`    the index tables on the host: each slot's parameters at each entry, and their offsets
- `pool`      the device memory: an arena, and the tables that the kernels read
- `segments`  a step's runs of tokens, sorted by adapter and by mix
- `batch`     the step's metadata on the device, cut into tiles
"""

from __future__ import annotations

from loraplex_kernels.pool.batch import LoraBatch, LoraBatchBuffers
from loraplex_kernels.pool.layout import (
    ALIGNMENT,
    SCALE_BYTES,
    AdapterLayout,
    adapter_layout,
    extent_alignment,
)
from loraplex_kernels.pool.pool import LoraPool
from loraplex_kernels.pool.segments import DECODE_ROWS, PREFILL_ROWS, HostSegments, Run, tile_rows
from loraplex_kernels.pool.shapes import (
    MAX_RANK,
    MAX_SLICES,
    RANK_ALIGN,
    Bottleneck,
    BottleneckReads,
    EntryShape,
    LoraSite,
    VectorKind,
    VectorShape,
    padded_rank,
)
from loraplex_kernels.pool.tables import SlotTables

__all__ = [
    "ALIGNMENT",
    "DECODE_ROWS",
    "MAX_RANK",
    "MAX_SLICES",
    "PREFILL_ROWS",
    "RANK_ALIGN",
    "SCALE_BYTES",
    "AdapterLayout",
    "Bottleneck",
    "BottleneckReads",
    "EntryShape",
    "HostSegments",
    "LoraBatch",
    "LoraBatchBuffers",
    "LoraPool",
    "LoraSite",
    "Run",
    "SlotTables",
    "VectorKind",
    "VectorShape",
    "adapter_layout",
    "extent_alignment",
    "padded_rank",
    "tile_rows",
]
