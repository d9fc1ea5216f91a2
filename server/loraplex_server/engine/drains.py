"""Unloads that wait for requests to end, and the time by which these have to."""

from __future__ import annotations

import time
from collections.abc import Callable

from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.core.errors import ServerError


class Drains:
    """Unloads with a time limit, until the adapter is free or the limit has passed.

    Attributes:
        pending: name and end (`time.monotonic()`) of each.
    """

    def __init__(self, adapters: AdapterStore) -> None:
        self._adapters = adapters
        self.pending: dict[object, tuple[str, float]] = {}

    def unload(self, name: str, grace_s: float | None, done: Callable[[], None]) -> None:
        """As `AdapterStore.unload`; `overdue` tells `grace_s` seconds later, if it is not free by then.

        Raises:
            NotFoundError: there is no such adapter.
        """
        key = object()

        def freed() -> None:
            self.pending.pop(key, None)
            done()

        if grace_s is not None:
            self.pending[key] = name, time.monotonic() + grace_s
        try:
            self._adapters.unload(name, freed)
        except ServerError:
            self.pending.pop(key, None)
            raise

    def overdue(self, now_s: float) -> list[str]:
        """Names of adapters whose time is over; each is told once."""
        over = [(key, name) for key, (name, end_s) in self.pending.items() if now_s >= end_s]
        for key, _ in over:
            del self.pending[key]
        return [name for _, name in over]
