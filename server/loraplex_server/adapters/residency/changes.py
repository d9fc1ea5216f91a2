"""Changes of adapters since they were last asked for, for those who watch."""

from __future__ import annotations

from collections.abc import Callable

from loraplex_server.core.adapter_status import AdapterChanges, AdapterStatus


class Changes:
    """Names whose adapters are not as they were; none are kept while nobody watches.

    Args:
        status_of: the adapter of a name as it is now, None if there is none.
    """

    def __init__(self, status_of: Callable[[str], AdapterStatus | None]) -> None:
        self._status_of = status_of
        self._names: set[str] = set()
        self._watched = False

    def watch(self, watched: bool) -> None:
        """Has changes kept for `drain`, or kept no longer."""
        self._watched = watched
        self._names.clear()

    def touch(self, name: str) -> None:
        """The adapter of this name is not as it was."""
        if self._watched:
            self._names.add(name)

    def drain(self) -> AdapterChanges:
        """Changes since the last call: adapters as they are now, and names that are gone."""
        names, self._names = sorted(self._names), set()
        found = {name: self._status_of(name) for name in names}
        return AdapterChanges(
            tuple(status for status in found.values() if status is not None),
            tuple(name for name, status in found.items() if status is None),
        )
