"""Room on the device for the adapters of waiting requests: who asks for it, and for whom it is kept.

Until its *patience* (`max_adapter_wait_s`) has run out, a request waits for an adapter that falls idle by
itself. Then an adapter in use is *closed*: it gets no new requests and is evicted once those that run have
ended. Each request that waits closes one, and more the longer it waits. An adapter stays open for at least
the patience after it came into use, so that one swap serves all who wait for it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection
from typing import Protocol

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.core.errors import ServerError
from loraplex_server.engine.sequence import Sequence

MAX_BLOCKED = 8
"""Requests for which no room was found in one step, after which no others are tried. Each costs a search of
the arena, so this bounds the time of a step while thousands wait."""

_ALONE_AFTER_PATIENCES = 8
"""A request that has waited this many times its patience is the only one that room is made for: one that
needs much room must not have it taken away piece by piece. With the default patience, 40 s."""

_DOUBLE_AFTER_PATIENCES = 4
"""After each wait of this many times its patience, twice as many adapters are closed for a request. With the
default patience, 20 s, in which those that were closed before had time to fall idle."""

_MAX_DOUBLINGS = 16
"""2 ** 16 adapters are more than a device has slots."""

_FUTILE_AFTER_PATIENCES = 8
"""An adapter that has been closed for this many times the patience and is still in use is held by answers
that take too long to wait for: others are closed before it."""


class AdapterReadiness(Protocol):
    """The scheduler's questions to the adapter store. No call blocks."""

    def reserve(self, handles: tuple[AdapterHandle, ...]) -> Readiness:
        """Takes device references to all of `handles` (READY, LOADING) or to none (BLOCKED, FAILED)."""

    def is_ready(self, handles: tuple[AdapterHandle, ...]) -> Readiness:
        """READY once reserved adapters are all on the device; LOADING until then, FAILED if one cannot be."""

    def unreserve(self, handles: tuple[AdapterHandle, ...]) -> None:
        """Gives the device references back."""

    def device_references(self, name: str) -> int:
        """Device references to the adapter of this name, all its versions together."""

    def failure(self, handles: tuple[AdapterHandle, ...]) -> ServerError | None:
        """The error for which the last answer for `handles` was FAILED."""


@dataclasses.dataclass
class _Use:
    """A spell in which an adapter was in use without a break.

    Attributes:
        since_s: its beginning.
        closed_s: when the adapter was first closed to new requests.
    """

    name: str
    since_s: float
    closed_s: float | None = None

    def closed_longer_than(self, seconds: float, now_s: float) -> bool:
        return self.closed_s is not None and now_s - self.closed_s > seconds


@dataclasses.dataclass(frozen=True)
class KeptRoom:
    """Room that is kept in one step for requests that have waited beyond their patience.

    Attributes:
        open_adapters: adapters in use that may get more requests; None if room is kept for nobody.
        priority: of the requests that it is kept for; higher ones are not concerned.
    """

    open_adapters: Collection[str] | None = None
    priority: int = 0

    def leaves(self, sequence: Sequence, *, resident: bool = False) -> bool:
        """True if a sequence may be admitted without taking what is kept.

        Args:
            resident: only if, besides, its adapters are on the device.
        """
        handles = sequence.handles
        if not handles or sequence.reserved:
            return True
        names = self.open_adapters
        if names is None or sequence.request.priority > self.priority:
            if not resident:
                return True
            names = None
        # One at a time: thousands may wait.
        for handle in handles:
            if not handle.resident or (names is not None and handle.name not in names):
                return False
        return True


class AdapterRoom:
    """Asks the store for room and says which adapters have to make some.

    Args:
        patience_s: how long a request waits for an adapter that falls idle by itself.
    """

    def __init__(self, adapters: AdapterReadiness, patience_s: float) -> None:
        self._adapters = adapters
        self._patience_s = patience_s
        self._in_use: dict[str, _Use] = {}

    def ask(self, sequence: Sequence, now_s: float) -> Readiness:
        """Asks for a sequence's adapters: has them brought in if there is room. The store's answer."""
        if not sequence.handles:
            return Readiness.READY
        if sequence.reserved:
            return self._adapters.is_ready(sequence.handles)
        readiness = self._adapters.reserve(sequence.handles)
        if readiness in (Readiness.READY, Readiness.LOADING):
            sequence.reserved = True
            for handle in sequence.handles:
                self._in_use.setdefault(handle.name, _Use(handle.name, now_s))
        return readiness

    def give_back(self, sequence: Sequence) -> None:
        """Ends a sequence's device references, if it has any."""
        if not sequence.reserved:
            return
        self._adapters.unreserve(sequence.handles)
        sequence.reserved = False
        for handle in sequence.handles:
            if not self._adapters.device_references(handle.name):
                self._in_use.pop(handle.name, None)

    def failure(self, sequence: Sequence) -> ServerError | None:
        """The error for which a sequence cannot have its adapters."""
        return self._adapters.failure(sequence.handles)

    def impatient(self, waiting: list[Sequence], now_s: float) -> list[Sequence]:
        """Those that have waited for room beyond their patience; a few, by priority and then the longest."""
        waits = [
            (-sequence.request.priority, sequence.adapter_wait_start_s, number)
            for number, sequence in enumerate(waiting)
            if sequence.adapter_wait_start_s is not None
            and now_s - sequence.adapter_wait_start_s > self._patience_s
            and not sequence.reserved
        ]
        if not waits:
            return []
        alone = now_s - min(waits)[1] > _ALONE_AFTER_PATIENCES * self._patience_s > 0
        return [waiting[number] for *_, number in heapq.nsmallest(1 if alone else MAX_BLOCKED, waits)]

    def keep_for(self, impatient: list[Sequence], now_s: float) -> KeptRoom:
        """Closes adapters for those of `impatient` that have no room yet."""
        lacking = [sequence for sequence in impatient if not sequence.reserved]
        if not lacking:
            return KeptRoom()
        due = [use for use in self._in_use.values() if now_s - use.since_s >= self._patience_s]
        # Those with the fewest requests fall idle soonest.
        futile_s = _FUTILE_AFTER_PATIENCES * self._patience_s
        references = self._adapters.device_references
        due.sort(key=lambda use: (use.closed_longer_than(futile_s, now_s), references(use.name)))
        closed = due[: sum(self._num_to_close(sequence, now_s) for sequence in lacking)]
        for use in closed:
            use.closed_s = now_s if use.closed_s is None else use.closed_s
        return KeptRoom(
            open_adapters=self._in_use.keys() - {use.name for use in closed},
            priority=max(sequence.request.priority for sequence in lacking),
        )

    def _num_to_close(self, sequence: Sequence, now_s: float) -> int:
        assert sequence.adapter_wait_start_s is not None
        if self._patience_s <= 0:
            return 1 << _MAX_DOUBLINGS
        beyond_s = now_s - sequence.adapter_wait_start_s - self._patience_s
        doublings = int(beyond_s / (_DOUBLE_AFTER_PATIENCES * self._patience_s))
        return 1 << min(doublings, _MAX_DOUBLINGS)

    @staticmethod
    def note_wait(sequence: Sequence, now_s: float) -> None:
        """A sequence, and with it its flow, waits for its adapters."""
        flow = sequence.flow
        assert flow is not None
        if sequence.adapter_wait_start_s is None:
            sequence.adapter_wait_start_s = now_s
        if not flow.awaits_adapters:
            flow.wait_from_s, flow.wait_until_s = now_s, None

    @staticmethod
    def end_wait(sequence: Sequence, now_s: float) -> None:
        """A sequence is admitted: adds up for how long it waited for its adapters."""
        flow = sequence.flow
        assert flow is not None
        if flow.awaits_adapters:
            flow.wait_until_s = now_s
        from_s, until_s = sequence.adapter_wait_start_s, now_s
        if from_s is None and sequence.first_scheduled_s is None and flow.wait_from_s is not None:
            # It stood behind the one that the wait was noted for.
            from_s, until_s = max(flow.wait_from_s, sequence.arrival_s), flow.wait_until_s or now_s
        if from_s is not None:
            sequence.adapter_wait_s += max(0.0, until_s - from_s)
            sequence.adapter_wait_start_s = None
