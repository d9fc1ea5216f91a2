"""The number of restarts that an engine has."""

from __future__ import annotations

import collections
import time

_WINDOW_S = 600.0
_FIRST_PAUSE_S = 0.5


class RestartBudget:
    """At most `most` restarts in ten minutes, each after a longer pause: a fault that stays must not loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._at_s: collections.deque[float] = collections.deque()

    def take(self) -> float | None:
        """Seconds to wait before the next restart; None if there is none left."""
        now_s = time.monotonic()
        while self._at_s and now_s - self._at_s[0] > _WINDOW_S:
            self._at_s.popleft()
        if len(self._at_s) >= self._most:
            return None
        self._at_s.append(now_s)
        return float(_FIRST_PAUSE_S * 2 ** (len(self._at_s) - 1))
