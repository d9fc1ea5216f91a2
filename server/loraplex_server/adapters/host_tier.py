"""Room in host memory: copies of adapters ready for the device, within a budget of bytes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable

from loraplex_server.adapters.record import Record
from loraplex_server.adapters.weights import HostBlob


class HostTier:
    """Which adapters have a host copy or are about to. Least recently used copies leave first.

    Args:
        capacity_bytes: for copies and for what is being read; one tensor at a time comes on top.
        evicted: told of each adapter whose copy leaves because another needs the room.
    """

    def __init__(self, capacity_bytes: int, evicted: Callable[[Record], None]) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._evicted = evicted
        # All records with a host copy, least recently used first.
        self._order: collections.OrderedDict[Record, None] = collections.OrderedDict()

    @property
    def records(self) -> Collection[Record]:
        """Every record with a host copy, least recently used first."""
        return self._order.keys()

    def begin(self, record: Record, *, demanded: bool) -> bool:
        """Sets the bytes of `record` aside for a worker to read it; False if there is no room for it now.

        A demand may take any copy that is not on its way to the device; a prefetch only those of adapters
        that no request holds and its own hint does not name, so that prefetches do not drive each other out.
        Copies that nothing could bring back go last.
        """
        room = self.capacity_bytes - self.used_bytes
        victims: list[Record] = []
        for candidate in sorted(self._order, key=lambda other: other.irreplaceable and not other.resident):
            if room >= record.host_bytes:
                break
            spared = candidate.references or (candidate.hint and candidate.hint == record.hint)
            if not candidate.copying and (demanded or not spared):
                victims.append(candidate)
                room += candidate.host_bytes
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
        self._order[record] = None

    def touch(self, record: Record) -> None:
        """Makes `record`, which has a copy, the most recently used."""
        self._order.move_to_end(record)

    def drop(self, record: Record) -> None:
        """Lets go of a copy that no worker uses."""
        assert not record.copying
        record.blob = None
        self.used_bytes -= record.host_bytes
        del self._order[record]

    def check_integrity(self, records: Iterable[Record]) -> list[str]:
        """One line for each broken invariant, given all records there are."""
        problems = []
        held = [record for record in records if record.blob is not None or record.reading]
        if set(self._order) != {record for record in held if record.blob is not None}:
            problems.append("host: the eviction order does not list the adapters with a host copy")
        used = sum(record.host_bytes for record in held)
        if used != self.used_bytes or used > self.capacity_bytes:
            problems.append(f"host: {self.used_bytes} of {self.capacity_bytes} bytes counted, {used} in use")
        return problems
