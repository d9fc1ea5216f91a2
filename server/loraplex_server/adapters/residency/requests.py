"""References of requests to adapters, and room on the device that is set aside for them.

Two kinds of reference keep an adapter alive. A *registry* reference (`resolve` … `release`) belongs to a
request from admission to its end: the adapter is not forgotten. A *device* reference (`reserve` …
`unreserve`) belongs to a request that runs or waits with its room set aside: the adapter is not evicted. A
request reserves all its adapters or none, so requests cannot hold each other up.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence

from loraplex_server.adapters.residency.activity import Activity
from loraplex_server.adapters.residency.device_tier import DeviceTier
from loraplex_server.adapters.residency.record import AdapterHandle, Readiness, Record
from loraplex_server.adapters.residency.registry import Registry
from loraplex_server.adapters.residency.versions import Versions
from loraplex_server.core.errors import FailedPreconditionError, InternalError, Reason, ServerError


class Requests:
    """The references of all requests; the one count of what is in use.

    Args:
        find: the version that a name means, as `Intake.find`.
    """

    def __init__(
        self,
        registry: Registry,
        versions: Versions,
        device: DeviceTier,
        activity: Activity,
        find: Callable[[str], Record],
    ) -> None:
        self._registry = registry
        self._versions = versions
        self._device = device
        self._activity = activity
        self._find = find
        self._handles: set[AdapterHandle] = set()

    def resolve(
        self, names: Sequence[str], weights: Sequence[float] | None = None
    ) -> tuple[AdapterHandle, ...]:
        """A registry reference to each adapter, for one request; what is on disk is read ahead from now on.

        Args:
            weights: one for each name; 1 where left out.

        Their number is for the engine's admission to limit.

        Raises:
            NotFoundError: there is no such adapter.
            FailedPreconditionError: they can never be on the device together, one cannot be served, or one
                that does more than add to the base is weighted or not alone.
        """
        records = tuple(self._find(name) for name in names)
        _check_mix(records, weights or [1.0] * len(names))
        self._versions.pins.check_fits(records, "the adapters of this request", "the request")
        handles = tuple(AdapterHandle(record, records) for record in records)
        for handle in handles:
            handle.record.references += 1
            self._handles.add(handle)
            self._versions.popularity.used(handle.record)
        self._versions.loading.prefetch(record for record in records if record.slot is None)
        return handles

    def release(self, handles: Iterable[AdapterHandle]) -> None:
        """Ends references, device references that are still held included. Each handle is released once."""
        handles = tuple(handles)
        self.unreserve(handles)
        for handle in handles:
            if handle not in self._handles:
                raise InternalError(f"{handle} was released twice")
            self._handles.remove(handle)
            record = handle.record
            record.references -= 1
            if not record.references:
                self._versions.loading.not_expected(record)
            self._versions.settle(record)

    def reserve(self, handles: Sequence[AdapterHandle]) -> Readiness:
        """Asks for all adapters of a request on the device; never waits, and takes all or nothing.

        READY and LOADING hold a device reference to each until `unreserve`; BLOCKED and FAILED hold nothing.
        BLOCKED still has what is missing read into host memory, as far as there is room.
        """
        if any(handle.reserved for handle in handles):
            raise InternalError("an adapter is reserved already")
        self._activity.asked(handles)
        records = list(dict.fromkeys(handle.record for handle in handles))
        if any(record.error for record in records):
            return Readiness.FAILED
        versions = self._versions
        missing = [record for record in records if record.slot is None]
        if missing and (versions.pins.waiting or not self._device.place(missing, keep=records)):
            versions.loading.prefetch(missing)
            return Readiness.BLOCKED
        for handle in handles:
            handle.reserved = True
            handle.record.device_references += 1
        for record in records:
            record.hint = 0
        for record in missing:
            versions.loading.fetch(record)
        return self.is_ready(handles)

    def is_ready(self, handles: Sequence[AdapterHandle]) -> Readiness:
        """READY, LOADING or FAILED, for handles that are reserved. FAILED keeps the references, too."""
        if not all(handle.reserved for handle in handles):
            raise InternalError("an adapter is not reserved")
        if any(handle.record.error for handle in handles):
            return Readiness.FAILED
        return Readiness.READY if all(handle.record.resident for handle in handles) else Readiness.LOADING

    def unreserve(self, handles: Iterable[AdapterHandle]) -> None:
        """Gives device references back; handles without one are left alone."""
        for handle in handles:
            if handle.reserved:
                handle.reserved = False
                handle.record.device_references -= 1
                self._versions.settle(handle.record)

    def failure(self, handles: Iterable[AdapterHandle]) -> ServerError | None:
        """The error of a request that cannot have its adapters."""
        return next((handle.record.error for handle in handles if handle.record.error), None)

    def slot(self, handle: AdapterHandle) -> int:
        """The pool's slot of an adapter that is reserved and READY; the same until it is unreserved."""
        slot = handle.record.slot
        if slot is None or not handle.reserved or not handle.record.resident:
            raise InternalError(f"{handle} is not on the device")
        return slot

    def references(self) -> int:
        """Registry references of all requests together."""
        return len(self._handles)

    def device_references(self, name: str) -> int:
        """Device references of all requests to the adapter of this name, all its versions together."""
        retired = (record for record in self._registry.retired if record.name == name)
        served = self._registry.served.get(name)
        return sum(record.device_references for record in (*retired, served) if record is not None)

    def groups(self) -> set[tuple[Record, ...]]:
        """The versions that each request needs together."""
        return {handle.group for handle in self._handles}

    def check_integrity(self, records: Iterable[Record]) -> list[str]:
        """A line for each of `records` that counts other references than are held."""
        references = collections.Counter(handle.record for handle in self._handles)
        reserved = collections.Counter(handle.record for handle in self._handles if handle.reserved)
        problems = []
        for record in records:
            counted = record.references, record.device_references
            held = references[record], reserved[record]
            if counted != held:
                problems.append(f"adapter {record.name!r}: counts {counted} references, {held} are held")
        return problems


def _check_mix(records: Sequence[Record], weights: Sequence[float]) -> None:
    alone = len(records) == 1 and weights[0] == 1
    for record in records:
        if not alone and not record.manifest.linear:
            raise FailedPreconditionError(
                f"adapter {record.name!r} does more than add to what the base computes "
                f"({record.manifest.peft_type}): neither a weight nor a sum with others is defined for it; "
                "name it alone, at weight 1",
                resource=("adapter", record.name),
                reason=Reason.ADAPTERS_NOT_ADDABLE,
            )
