"""Disk to host, host to device: the order in which it is done, and the two workers that do it.

What a running request needs goes first, then what a waiting one will need, then hints. One read runs and one
waits in line, so that the reader never idles and the order stays ours to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loraplex_server.adapters.files.weights import HostBlob
from loraplex_server.adapters.residency.device_tier import DeviceTier
from loraplex_server.adapters.residency.host_tier import HostTier
from loraplex_server.adapters.residency.record import Record
from loraplex_server.adapters.residency.workers import DeviceCopier, Outcome, Worker

_READS_IN_FLIGHT = 2
"""One that runs and one in line."""


class Loading:
    """The order of reads and copies. Every method belongs to the engine's thread.

    Args:
        read: reads a record's weights; called on the reader's thread.
        was_read, was_copied: told of each outcome, on the engine's thread.
        post: as for `Worker`.
    """

    def __init__(
        self,
        host: HostTier,
        device: DeviceTier,
        *,
        read: Callable[[Record], HostBlob],
        was_read: Callable[[Record, Outcome[HostBlob]], None],
        was_copied: Callable[[Record, Outcome[None]], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._host = host
        self._device = device
        self._read_weights = read
        self._was_read = was_read
        self._was_copied = was_copied
        # Waiting to be read, first come first served; demand before prefetch before hints.
        self._demanded: dict[Record, None] = {}
        self._prefetched: dict[Record, None] = {}
        self._hinted: dict[Record, bool] = {}
        self._hints = 0
        self._reads = 0
        self._closed = False
        self.reader = Worker("adapter-reader", post)
        self._copier = Worker("adapter-copier", post)
        self._copies = DeviceCopier(device.pool.arena)

    @property
    def busy(self) -> bool:
        """True if a read or a copy is under way."""
        return self._reads > 0 or any(record.copying for record in self._device.records)

    def demand(self, record: Record) -> None:
        """Has `record` read as soon as it is its turn."""
        self._prefetched.pop(record, None)
        self._demanded[record] = None
        self._dispatch()

    def prefetch(self, records: Iterable[Record]) -> None:
        """Has those read that are not in host memory, once no demand waits."""
        for record in records:
            if record.blob is None and not record.reading and record not in self._demanded:
                self._prefetched[record] = None
        self._dispatch()

    def hint(self, records: Iterable[Record], *, to_device: bool) -> None:
        """Has those brought in, once nobody waits for anything and as far as there is room."""
        self._hints += 1
        for record in records:
            if record.slot is None and (to_device or record.blob is None):
                record.hint = self._hints
                self._hinted[record] = to_device

    def fetch(self, record: Record) -> None:
        """Goes on with bringing in a record that has just got room on the device."""
        if record.blob is not None:
            self.copy(record, record.blob)
        elif not record.reading:
            self.demand(record)

    def copy(self, record: Record, blob: HostBlob) -> None:
        """Copies what was read into the record's extent."""
        record.copying = True
        job = self._copies.prepare(record.start, blob.data)
        self._copier.submit(job, lambda outcome: self._was_copied(record, outcome))

    def not_expected(self, record: Record) -> None:
        """No request waits for it any more."""
        self._prefetched.pop(record, None)

    def not_demanded(self, record: Record) -> None:
        """It lost its room on the device before it was read; those that still hold it may want it later."""
        if record in self._demanded and record.on_loaded is None:
            del self._demanded[record]
            if record.references:
                self._prefetched[record] = None

    def retired(self, record: Record) -> None:
        """It is no longer registered: only requests that run with it still want it."""
        self._hinted.pop(record, None)
        if not record.device_references:
            self._demanded.pop(record, None)

    def run(self, *, may_place: bool) -> None:
        """Gives the workers what is due; `may_place` is whether hints may take free room on the device."""
        self._dispatch()
        self._follow_hints(may_place)

    def close(self) -> None:
        """Stops the workers, after what they are at."""
        self._closed = True
        self.reader.close()
        self._copier.close()

    def _dispatch(self) -> None:
        """Starts reads while the reader has little to do and there is host memory for them."""
        while self._reads < _READS_IN_FLIGHT and not self._closed and (self._demanded or self._prefetched):
            demanded = bool(self._demanded)
            waiting = self._demanded if demanded else self._prefetched
            record = next(iter(waiting))
            if not self._host.begin(record, demanded=demanded):
                return
            del waiting[record]
            self._read(record)

    def _follow_hints(self, may_place: bool) -> None:
        for record, to_device in list(self._hinted.items()):
            if record.slot is not None:
                del self._hinted[record]
            elif record.blob is not None:
                del self._hinted[record]
                kept = [r for r in self._device.records if r.references or r.hint == record.hint]
                if to_device and may_place and self._device.place([record], keep=kept):
                    self.copy(record, record.blob)
            elif not record.reading:
                if self._reads >= _READS_IN_FLIGHT or self._demanded or self._prefetched or self._closed:
                    return
                if self._host.begin(record, demanded=False):
                    self._read(record)
                else:
                    del self._hinted[record]

    def _read(self, record: Record) -> None:
        self._reads += 1

        def finished(outcome: Outcome[HostBlob]) -> None:
            self._reads -= 1
            self._was_read(record, outcome)

        self.reader.submit(lambda: self._read_weights(record), finished)
