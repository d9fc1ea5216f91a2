"""The pool's index tables on the host: each slot's parameters at each entry, and their offsets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loraplex_kernels.pool.shapes import Bottleneck, VectorKind


@dataclass
class SlotTables:
    """The pool's tables on the host. `version` grows with each slot written; older derived data is stale."""

    a_offset: np.ndarray
    b_offset: np.ndarray
    rank: np.ndarray
    vector_offset: np.ndarray
    """int64 ``[num_slots, kinds, num_entries]``: first element of a vector, -1 where there is none."""
    has_vectors: np.ndarray
    """bool ``[num_slots]``: true if the slot has a vector of any kind at any entry."""
    outside: np.ndarray
    """bool ``[num_slots]``: true if the slot's adapter acts at entries after those of projections."""
    tokens: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """int64 by (slot, entry): the token ids of the slot's `TOKEN_ROWS` there, ascending."""
    bottleneck: dict[int, Bottleneck] = field(default_factory=dict)
    """By slot: the shape of its adapter's networks, if it has any."""
    version: int = 0

    @classmethod
    def empty(cls, num_slots: int, num_entries: int) -> SlotTables:
        shape = (num_slots, num_entries)
        return cls(
            a_offset=np.zeros(shape, np.int64),
            b_offset=np.zeros(shape, np.int64),
            rank=np.zeros(shape, np.int32),
            vector_offset=np.full((num_slots, len(VectorKind), num_entries), -1, np.int64),
            has_vectors=np.zeros(num_slots, np.bool_),
            outside=np.zeros(num_slots, np.bool_),
        )

    def clear(self, slot: int) -> None:
        self.rank[slot] = 0
        self.vector_offset[slot] = -1
        self.has_vectors[slot] = False
        self.outside[slot] = False
        for key in [key for key in self.tokens if key[0] == slot]:
            del self.tokens[key]
        self.bottleneck.pop(slot, None)
