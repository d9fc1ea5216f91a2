"""Pins: adapters that stay on the device, as long as that leaves the others enough room."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from loraplex_server.adapters.residency.device_tier import DeviceTier
from loraplex_server.adapters.residency.record import Record
from loraplex_server.core.errors import FailedPreconditionError, Reason


class Pins:
    """The pinned adapters of one device, and those of them that wait for room there.

    Args:
        most: how many there may be; 0 is one fewer than the slots, which is the most in any case.
        itemsize: bytes of an element of the device's arena.
    """

    def __init__(self, device: DeviceTier, most: int, itemsize: int) -> None:
        self._device = device
        self._itemsize = itemsize
        self.most = min(most or device.num_slots, device.num_slots - 1)
        self.records: set[Record] = set()
        self._waiting: dict[Record, None] = {}
        # New versions of pinned adapters, while the old ones leave too little room.
        self._owed: dict[Record, None] = {}

    @property
    def waiting(self) -> bool:
        """True if a pinned adapter has no room yet: then it is its turn."""
        return bool(self._waiting)

    def pin(self, record: Record) -> None:
        """Pins what was checked."""
        record.pinned = True
        self.records.add(record)
        if record.slot is None:
            self._waiting[record] = None

    def unpin(self, record: Record) -> None:
        """Lets go of a pin, or of one that is owed."""
        record.pinned = False
        self.records.discard(record)
        self._waiting.pop(record, None)
        self._owed.pop(record, None)

    def pass_on(self, old: Record, new: Record) -> None:
        """Owes the pin of one version to the next, if it has one; see `settle`."""
        if old.pinned or old in self._owed:
            self._owed[new] = None
        self.unpin(old)

    def settle(self, still_wanted: Callable[[Record], bool], check: Callable[[Record], None]) -> list[Record]:
        """Pins what a pin is owed to, as far as `check` lets it; gives those."""
        pinned = []
        for record in list(self._owed):
            if still_wanted(record):
                try:
                    check(record)
                except FailedPreconditionError:
                    continue
                self.pin(record)
                pinned.append(record)
            self._owed.pop(record, None)
        return pinned

    def place(self, fetch: Callable[[Record], None]) -> None:
        """Gives those that wait room on the device, first come first served, and has them fetched."""
        for record in list(self._waiting):
            if not self._device.place([record]):
                return
            del self._waiting[record]
            fetch(record)

    def check(self, record: Record, others: Iterable[Record], groups: Iterable[Collection[Record]]) -> None:
        """Raises FailedPreconditionError unless `record` may be pinned.

        Args:
            others: whatever else is registered, of which the largest has to fit beside the pins.
            groups: what requests that are under way need together.
        """
        pinned = {record, *self.records}
        if len(pinned) > self.most:
            raise FailedPreconditionError(
                f"{len(self.records)} adapters are pinned, and at most {self.most} may be: fewer than the "
                f"slots, {self._device.num_slots}, and no more than --max-pinned-adapters; unpin one first",
                resource=("adapter", record.name),
                reason=Reason.NO_ROOM_TO_PIN,
            )
        largest = max((other for other in others if other not in pinned), key=_size, default=None)
        for group in {*map(frozenset, groups), frozenset([largest] if largest else [])}:
            beside = ", ".join(sorted({member.name for member in group} - {record.name})) or "nothing"
            self.check_fits(group | pinned, f"{record.name!r} pinned and {beside} beside it", "the pin")

    def check_fits(self, records: Iterable[Record], what: str, whose: str) -> None:
        """Raises FailedPreconditionError unless `records` fit on the device beside all pins."""
        together = {*records, *self.records}
        if self._device.could_fit(together):
            return
        needed = sum(record.units for record in together) * self._itemsize
        capacity = self._device.capacity_units * self._itemsize
        raise FailedPreconditionError(
            f"{what} need {len(together)} slots and {needed} bytes on the device, pinned ones included; it "
            f"has {self._device.num_slots} slots and {capacity} bytes, so {whose} is refused",
            reason=Reason.NO_ROOM_TO_PIN,
        )


def _size(record: Record) -> int:
    return record.units
