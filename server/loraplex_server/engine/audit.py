"""Audits of an engine: its pools against their holders, and the base weights against their checksum."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from typing import NamedTuple

from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.engine.scheduler import Scheduler

_log = logging.getLogger(__name__)

_SETTLE_S = 0.5
"""Idle time before an audit begins, so that not every short pause starts one."""

_EVERY_S = 5.0
"""Least time between two audits, each of which reads all weights."""


class Findings(NamedTuple):
    """One line for each broken invariant, and the SHA-256 over the resident base weights."""

    problems: tuple[str, ...]
    weight_checksum: str


class Audit:
    """One audit after each spell of work, a tensor at a time, so that a new request never waits for it.

    Attributes:
        problems: lines of the last audit of the pools; empty when all is well.
        weights_ok: whether the weights had their checksum when last looked at.
        passes: audits completed.
    """

    def __init__(
        self,
        check_pools: Callable[[], list[str]],
        weight_checksum: Callable[[], Generator[None, None, str]],
        expected: str,
    ) -> None:
        self._check_pools = check_pools
        self._weight_checksum = weight_checksum
        self._expected = expected
        self._due = True
        self._idle_since_s: float | None = None
        self._last_s = -_EVERY_S
        self._running: Generator[None, None, str] | None = None
        self.problems: tuple[str, ...] = ()
        self.weights_ok = True
        self.passes = 0

    def worked(self) -> None:
        """A step ran: audit again when there is time."""
        self._due = True
        self._idle_since_s = None

    def idle(self) -> bool:
        """Does a piece of the audit, if one is due. Whether there is more to do at once."""
        if self._running is None:
            return self._begin(time.monotonic())
        try:
            next(self._running)
        except StopIteration as end:
            self._running = None
            self.weights_ok = end.value == self._expected
            self.passes += 1
            if not self.weights_ok:
                _log.error("the base weights have changed since they were loaded")
            return False
        return True

    def check_now(self) -> Findings:
        """Checks everything at once, which takes as long as the weights take to read."""
        problems = self._check_pools()
        checksum = finish(self._weight_checksum())
        if checksum != self._expected:
            problems.append("the base weights have changed since they were loaded")
        return Findings(tuple(problems), checksum)

    def _begin(self, now_s: float) -> bool:
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        if not self._due or now_s - self._idle_since_s < _SETTLE_S or now_s - self._last_s < _EVERY_S:
            return False
        self._due, self._last_s = False, now_s
        self.problems = tuple(self._check_pools())
        for problem in self.problems:
            _log.error("integrity: %s", problem)
        self._running = self._weight_checksum()
        return True


def pool_problems(scheduler: Scheduler, adapters: AdapterStore, held: int) -> list[str]:
    """A line for each disagreement between a pool and its holders.

    Args:
        held: adapter references that requests hold.
    """
    problems = scheduler.check_integrity() + adapters.check_integrity()
    counted = adapters.requests.references()
    if counted != held:
        problems.append(f"the adapter store counts {counted} references, requests hold {held}")
    return problems


def finish(steps: Generator[None, None, str]) -> str:
    """Runs a checksum that comes in pieces to its end; the checksum."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return str(end.value)
