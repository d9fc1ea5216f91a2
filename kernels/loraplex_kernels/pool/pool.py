"""The adapters' device memory: one flat arena, and tables with the offsets of each slot's adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.pool.layout import SCALE_BYTES, AdapterLayout
from loraplex_kernels.pool.shapes import MAX_RANK, VectorKind, padded_rank
from loraplex_kernels.pool.tables import SlotTables


@dataclass(frozen=True, eq=False)
class LoraPool:
    """All adapters of one device. Make one with `allocate`; bind extents to slots with `bind` and `clear`.

    - `arena`     ``[num_elements]``, the compute dtype (float32, bfloat16 or float16), or int8
    - `a_offset`  int64 ``[num_slots, num_entries]``: first element of A in the arena
    - `b_offset`  int64 ``[num_slots, num_entries]``: first element of B transposed in the arena
    - `rank`      int32 ``[num_slots, num_entries]``: true rank; 0 where the adapter does not touch the entry
    - `host`      the tables on the host, those of vectors there alone; on a CPU pool they share memory
    - `dtype`     the compute dtype, which x and y have
    - `max_rank`  the largest rank that may be bound: the pitch of the intermediate result
    - `num_projections`  entries of layers' projections; those of norms and of the vocabulary follow
    """

    arena: Tensor
    a_offset: Tensor
    b_offset: Tensor
    rank: Tensor
    host: SlotTables = field(repr=False)
    dtype: torch.dtype
    max_rank: int = MAX_RANK
    num_projections: int = 0

    @classmethod
    def allocate(
        cls,
        *,
        num_elements: int,
        num_slots: int,
        num_entries: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int = MAX_RANK,
        scaled: bool = False,
        num_projections: int | None = None,
    ) -> LoraPool:
        """An arena of `num_elements`, zeroed, and `num_slots` slots in which no adapter is bound.

        `dtype`: the compute dtype, and that of the arena unless `scaled` asks for int8.
        """
        # Scales and vectors are read through a float32 view of the whole arena.
        num_elements += -num_elements % SCALE_BYTES if scaled else 0
        host = SlotTables.empty(num_slots, num_entries)
        return cls(
            arena=torch.zeros(num_elements, dtype=torch.int8 if scaled else dtype, device=device),
            a_offset=torch.from_numpy(host.a_offset).to(device),
            b_offset=torch.from_numpy(host.b_offset).to(device),
            rank=torch.from_numpy(host.rank).to(device),
            host=host,
            dtype=dtype,
            max_rank=padded_rank(max_rank),
            num_projections=num_entries if num_projections is None else num_projections,
        )

    @property
    def scaled(self) -> bool:
        """True if adapters are held in 8 bits, with scales."""
        return self.arena.dtype == torch.int8

    @property
    def nbytes(self) -> int:
        """Bytes on the device: the arena, and the tables."""
        return self.arena.nbytes + self.a_offset.nbytes + self.b_offset.nbytes + self.rank.nbytes

    @property
    def num_slots(self) -> int:
        return int(self.rank.shape[0])

    @property
    def num_entries(self) -> int:
        return int(self.host.rank.shape[1])

    def bind(self, slot: int, start: int, layout: AdapterLayout) -> None:
        """Make `slot` serve the adapter whose extent begins at element `start`.

        Queues the writes of the device tables on the current stream, ahead of the next step that reads them.
        The extent's copy must have finished. Raises `ValueError` if the extent does not fit or is misaligned.
        """
        self._check_fits(slot, start, layout)
        host = self.host
        entries = [shape.entry for shape in layout.entries]
        host.clear(slot)
        host.rank[slot, entries] = [shape.rank for shape in layout.entries]
        host.a_offset[slot, entries] = np.asarray(layout.a_offset, np.int64) + start
        host.b_offset[slot, entries] = np.asarray(layout.b_offset, np.int64) + start
        for vector, offset in zip(layout.vectors, layout.vector_offset, strict=True):
            host.vector_offset[slot, vector.kind, vector.entry] = start + offset
            if vector.kind is VectorKind.TOKEN_ROWS:
                host.tokens[slot, vector.entry] = np.asarray(vector.tokens, np.int64)
        host.has_vectors[slot] = bool(layout.vectors)
        host.outside[slot] = any(entry >= self.num_projections for entry in layout.touched)
        if layout.bottleneck is not None:
            host.bottleneck[slot] = layout.bottleneck
        self._publish(slot)

    def _check_fits(self, slot: int, start: int, layout: AdapterLayout) -> None:
        if start % layout.alignment:
            raise ValueError(f"slot {slot}: the extent begins at {start}, no multiple of {layout.alignment}")
        if start < 0 or start + layout.num_elements > self.arena.numel():
            raise ValueError(f"slot {slot}: the extent leaves the arena of {self.arena.numel()} elements")
        if any(not 0 <= entry < self.num_entries for entry in layout.touched):
            raise ValueError(f"slot {slot}: an entry lies outside the {self.num_entries} entries of the pool")
        if any(shape.rank > self.max_rank for shape in layout.entries):
            raise ValueError(f"slot {slot}: a rank is above the pool's max_rank of {self.max_rank}")
        if bool(layout.scale_offset) != self.scaled and layout.entries:
            raise ValueError(f"slot {slot}: the layout must{'' if self.scaled else ' not'} have scales here")

    def clear(self, slot: int) -> None:
        """Unbind `slot`: its tokens get no delta."""
        self.host.clear(slot)
        self._publish(slot)

    def _publish(self, slot: int) -> None:
        host = self.host
        host.version += 1
        if self.arena.device.type != "cpu":
            # A step may be running: copies from pinned memory do not wait for its end.
            pinned = self.arena.device.type == "cuda"
            for table, rows in (
                (self.a_offset, host.a_offset),
                (self.b_offset, host.b_offset),
                (self.rank, host.rank),
            ):
                row = torch.from_numpy(rows[slot])
                table[slot].copy_(row.pin_memory() if pinned else row, non_blocking=pinned)

    def a(self, slot: int, entry: int, in_features: int) -> Tensor:
        """A view of the true rank rows of A: ``[rank, in_features]``. Reads the host tables; copies
        nothing.
        """
        return self._rows(int(self.host.a_offset[slot, entry]), int(self.host.rank[slot, entry]), in_features)

    def b(self, slot: int, entry: int, width: int) -> Tensor:
        """A view of the true rank rows of B transposed: ``[rank, width]``."""
        return self._rows(int(self.host.b_offset[slot, entry]), int(self.host.rank[slot, entry]), width)

    def scale(self, slot: int, entry: int, width: int) -> Tensor:
        """A view of the scales of the true rank rows, float32 ``[rank]``; only in 8 bits."""
        rank = int(self.host.rank[slot, entry])
        start = int(self.host.b_offset[slot, entry]) + padded_rank(rank) * width
        return self.arena[start : start + rank * SCALE_BYTES].view(torch.float32)

    def vector(self, slot: int, kind: VectorKind, entry: int, length: int) -> Tensor:
        """A vector that the slot's adapter has, in the compute dtype: ``[length]``."""
        return self.matrix(slot, kind, entry, 1, length)[0].to(self.dtype)

    def matrix(self, slot: int, kind: VectorKind, entry: int, rows: int, length: int) -> Tensor:
        """A view of a vector of several rows: ``[rows, length]``, float32 where the pool is in 8 bits."""
        start = int(self.host.vector_offset[slot, kind, entry])
        if self.scaled:
            flat = self.arena[start : start + rows * length * SCALE_BYTES].view(torch.float32)
            return flat.view(rows, length)
        return self._rows(start, rows, length)

    def block(self, slot: int, kind: VectorKind, entry: int, length: int, first: int, rows: int) -> Tensor:
        """Rows `first` to `first + rows` of a block of vectors, in the compute dtype: ``[rows, length]``."""
        start, size = int(self.host.vector_offset[slot, kind, entry]), rows * length
        if self.scaled:
            start += first * length * SCALE_BYTES
            block = self.arena[start : start + size * SCALE_BYTES].view(torch.float32).to(self.dtype)
            return block.view(rows, length)
        return self._rows(start + first * length, rows, length)

    def _rows(self, offset: int, rank: int, length: int) -> Tensor:
        return self.arena.as_strided((rank, length), (length, 1), offset)
