"""A queue for changes of adapters, for one watcher."""

from __future__ import annotations

import asyncio

from loraplex_server.core.adapter_status import AdapterChanges, AdapterStatus
from loraplex_server.core.errors import ServerError


class AdapterWatcher:
    """Joins changes until the watcher takes them, so that it gets the newest state of each adapter.

    Use it in one event loop.
    """

    def __init__(self) -> None:
        # By name; None for a name that is not registered any more.
        self._pending: dict[str, AdapterStatus | None] = {}
        self._whole = False
        self._lost: ServerError | None = None
        self._news = asyncio.Event()

    def put(self, changes: AdapterChanges) -> None:
        """Adds changes from the engine; ignores those before the first complete list."""
        # They answer another watcher.
        self._whole = self._whole or changes.all
        if self._whole:
            current: dict[str, AdapterStatus] = {}
            for status in changes.adapters:
                # A draining adapter comes after its successor, which now has the name.
                current.setdefault(status.name, status)
            self._pending |= dict.fromkeys(changes.removed)
            self._pending |= current
            self._news.set()

    def fail(self, error: ServerError) -> None:
        """Ends the watch."""
        self._lost = error
        self._news.set()

    async def next(self) -> AdapterChanges:
        """Waits for changes; returns all that are pending.

        Raises:
            ServerError: the error of `fail`.
        """
        await self._news.wait()
        if self._lost is not None:
            raise self._lost
        self._news.clear()
        pending, self._pending = self._pending, {}
        return AdapterChanges(
            tuple(status for status in pending.values() if status is not None),
            tuple(name for name, status in pending.items() if status is None),
        )
