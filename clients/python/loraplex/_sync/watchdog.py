"""Ends waits of blocking calls that take too long: gRPC's own deadlines are for whole calls."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable

_IDLE_S = 5.0
"""The thread ends after so long without waits: long beside the pause between two tokens."""


class Watchdog:
    """One thread for any number of waits; it runs while it is needed."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waits: dict[int, tuple[float, Callable[[], None]]] = {}
        self._keys = itertools.count()
        self._thread: threading.Thread | None = None
        self._wakes = math.inf

    def watch(self, seconds: float, act: Callable[[], None]) -> int:
        """Calls `act` after `seconds` on another thread, unless `forget` gets the returned key before."""
        end = time.monotonic() + seconds
        with self._condition:
            key = next(self._keys)
            self._waits[key] = (end, act)
            # After a fork the thread is the parent's alone.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="loraplex-watchdog", daemon=True)
                self._thread.start()
            elif end < self._wakes:
                self._condition.notify()
        return key

    def forget(self, key: int) -> None:
        """Removes a wait; it may have ended just now."""
        with self._condition:
            self._waits.pop(key, None)

    def _run(self) -> None:
        while True:
            with self._condition:
                now = time.monotonic()
                late = [key for key, (end, _) in self._waits.items() if end <= now]
                acts = [self._waits.pop(key)[1] for key in late]
                if not acts:
                    self._wakes = min((end for end, _ in self._waits.values()), default=math.inf)
                    woken = self._condition.wait(min(self._wakes - now, _IDLE_S))
                    if not woken and not self._waits:
                        self._thread = None
                        return
            for act in acts:
                act()


WATCHDOG = Watchdog()
"""The watchdog of this process."""
