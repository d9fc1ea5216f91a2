"""Room in host memory: copies of adapters ready for the device, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from loraplex_server.adapters.files.weights import HostBlob
from loraplex_server.adapters.residency.popularity import LeastPopularFirst
from loraplex_server.adapters.residency.record import Record

_MAX_SPARED = 64
"""Copies that may not leave, after which no further ones are looked at: it bounds the time of a step."""


class HostTier:
    """The adapters that have a host copy or are about to. The copies that are least asked for leave first.

    Args:
        capacity_bytes: for copies and for what is being read; one tensor at a time comes on top.
        evicted: told of each adapter whose copy leaves because another needs the room.
    """

    def __init__(self, capacity_bytes: int, evicted: Callable[[Record], None]) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._evicted = evicted
        self._copies = LeastPopularFirst()

    @property
    def records(self) -> Iterator[Record]:
        """Every record with a host copy."""
        return iter(self._copies)

    def begin(self, record: Record, *, demanded: bool) -> bool:
        """Sets the bytes of `record` aside for a worker to read it; False if there is no room for it now.

        A demand may take any copy that is not on its way to the device; a prefetch only those of adapters
        that no request holds and its own hint does not name, so that prefetches do not drive each other out.
        Copies that nothing could bring back go last.
        """
        room = self.capacity_bytes - self.used_bytes
        victims: list[Record] = []
        spared: list[Record] = []
        last: list[Record] = []
        while room < record.host_bytes and len(spared) < _MAX_SPARED:
            candidate = self._copies.pop()
            if candidate is None:
                break
            kept = candidate.references or (candidate.hint and candidate.hint == record.hint)
            if candidate.copying or (kept and not demanded):
                spared.append(candidate)
            elif candidate.irreplaceable and not candidate.resident:
                last.append(candidate)
            else:
                victims.append(candidate)
                room += candidate.host_bytes
        while room < record.host_bytes and last:
            victims.append(last.pop(0))
            room += victims[-1].host_bytes
        for candidate in (*spared, *last, *victims):
            self._copies.add(candidate)
        if room < record.host_bytes:
            return False
        for victim in victims:
            self.drop(victim)
            self._evicted(victim)
        record.reading = True
        self.used_bytes += record.host_bytes
        return True

    def abandon(self, record: Record) -> None:
        """Reading it failed."""
        record.reading = False
        self.used_bytes -= record.host_bytes

    def arrived(self, record: Record, blob: HostBlob) -> None:
        """It was read."""
        record.reading = False
        record.blob = blob
        self._copies.add(record)

    def drop(self, record: Record) -> None:
        """Lets go of a copy that no worker uses."""
        assert not record.copying
        record.blob = None
        self.used_bytes -= record.host_bytes
        self._copies.discard(record)

    def check_integrity(self, records: Iterable[Record]) -> list[str]:
        """One line for each broken invariant, given all records there are."""
        problems = []
        held = [record for record in records if record.blob is not None or record.reading]
        if set(self._copies) != {record for record in held if record.blob is not None}:
            problems.append("host: it does not list the adapters with a host copy")
        used = sum(record.host_bytes for record in held)
        if used != self.used_bytes or used > self.capacity_bytes:
            problems.append(f"host: {self.used_bytes} of {self.capacity_bytes} bytes counted, {used} in use")
        return problems
