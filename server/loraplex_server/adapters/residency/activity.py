"""Counts for the operator: movements of adapters, and how often a request found its adapters in place."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from loraplex_server.adapters.residency.record import AdapterHandle, Record
from loraplex_server.core.adapter_status import SwapRecord

_MAX_SWAP_RECORDS = 4096
"""Movements that are kept until they are drained, the latest; the engine drains them ten times a second."""


class Activity:
    """Counters and movements.

    Attributes:
        hits: how often a request found an adapter on the device when it first asked for it.
        misses: how often a request did not.
    """

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self._swaps: collections.deque[SwapRecord] = collections.deque(maxlen=_MAX_SWAP_RECORDS)

    def moved(self, kind: str, record: Record, seconds: float = 0.0) -> None:
        """Notes a movement; `kind` as in `SwapRecord`."""
        self._swaps.append(SwapRecord(kind, record.name, seconds, record.host_bytes))

    def drain_swaps(self) -> list[SwapRecord]:
        """Movements since the last call."""
        swaps = list(self._swaps)
        self._swaps.clear()
        return swaps

    def asked(self, handles: Iterable[AdapterHandle]) -> None:
        """A request asks for these on the device; the first time it is a hit or a miss."""
        for handle in handles:
            if not handle.counted:
                handle.counted = True
                hit = handle.record.resident
                handle.record.hits += hit
                handle.record.misses += not hit
                self.hits += hit
                self.misses += not hit
