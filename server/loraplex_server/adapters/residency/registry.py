"""Names and their versions: the one that is served, its successor, those on their way in, broken ones."""

from __future__ import annotations

from loraplex_server.adapters.residency.changes import Changes
from loraplex_server.adapters.residency.inspection import Broken, Inspection, not_found, taken
from loraplex_server.adapters.residency.record import Record, unread_status
from loraplex_server.adapters.residency.tokenizers import Tokenizers
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import ServerError


class Registry:
    """Names and versions; bookkeeping alone, nothing is read or moved here.

    Attributes:
        served: the version that a name means.
        candidates: versions that are read in to replace the one that is served.
        retired: versions that are no longer registered and not freed yet.
        arriving: names that come, whose files are being looked at.
        replacing: the same for what is to replace a registered adapter.
        broken: registered adapters that cannot be served.
        changes: for those who watch.
        tokenizers: of the versions that are served.
    """

    def __init__(self) -> None:
        self.served: dict[str, Record] = {}
        self.candidates: dict[str, Record] = {}
        self.retired: set[Record] = set()
        self.arriving: dict[str, Inspection] = {}
        self.replacing: dict[str, Inspection] = {}
        self.broken: dict[str, Broken] = {}
        self.changes = Changes(self._status_of)
        self.tokenizers = Tokenizers()

    def statuses(self) -> list[AdapterStatus]:
        """Every adapter, those that drain or are being looked at included, by name."""
        records = [*self.served.values(), *(record for record in self.retired if record.draining)]
        statuses = [record.status() for record in records]
        statuses += [unread_status(name, inspection.source) for name, inspection in self.arriving.items()]
        return sorted(statuses, key=lambda status: (status.name, status.draining))

    def status(self, name: str) -> AdapterStatus:
        """The adapter of this name; while there is none, one of that name that still drains.

        Raises:
            NotFoundError: there is none.
            ServerError: it was registered but cannot be served; the reason.
        """
        if name in self.broken:
            raise self.broken[name].error
        status = self._status_of(name)
        if status is None:
            raise not_found(name)
        return status

    def errors(self) -> dict[str, ServerError]:
        """The error of each registered adapter that cannot be served."""
        return {name: broken.error for name, broken in self.broken.items()}

    def versions(self) -> list[Record]:
        """Every version that may hold memory."""
        return [*self.served.values(), *self.candidates.values(), *self.retired]

    def draining(self, name: str) -> list[Record]:
        """Versions of this name that were replaced or unloaded, and are still held."""
        return [record for record in self.retired if record.draining and record.name == name]

    def is_served(self, record: Record) -> bool:
        """True if its name means this version."""
        return self.served.get(record.name) is record

    def check_free(self, name: str, source: str) -> None:
        """Raises AlreadyExistsError if the name is taken; the text names both sources."""
        if name in self.served:
            raise taken(name, self.served[name].source, source)
        if name in self.arriving:
            raise taken(name, self.arriving[name].source, source)

    def waiting(self, *, inplace: bool) -> dict[str, Inspection]:
        """Those whose files are being looked at, to replace others or to come anew."""
        return self.replacing if inplace else self.arriving

    def serve(self, record: Record) -> Record | None:
        """Has the name mean this version; gives the one that it meant before."""
        old = self.served.get(record.name)
        self.broken.pop(record.name, None)
        self.served[record.name] = record
        self.tokenizers.note(record.name, record.manifest)
        return old

    def retire(self, record: Record) -> None:
        """Takes a version out; its name means nothing unless another is served."""
        for registered in (self.served, self.candidates):
            if registered.get(record.name) is record:
                del registered[record.name]
        self.retired.add(record)
        record.retired = True
        served = self.served.get(record.name)
        self.tokenizers.note(record.name, None if served is None else served.manifest)
        self.changes.touch(record.name)

    def _status_of(self, name: str) -> AdapterStatus | None:
        record = self.served.get(name)
        if record is None and name in self.arriving:
            return unread_status(name, self.arriving[name].source)
        record = record or next(iter(self.draining(name)), None)
        return None if record is None else record.status()
