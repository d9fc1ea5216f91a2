"""The popularity of adapters, by which the tiers evict.

Every use adds 1 to an adapter's popularity, and every popularity halves within a number of uses of whatever
adapters. So recent uses count most and frequent ones add up: with a short half-life this is least recently
used, with an endless one least frequently used (LRFU, Lee et al. 2001). An adapter keeps its popularity while
it is evicted.

Popularity is kept as the base-2 logarithm of what it would be worth at the first use. So it never has to be
recomputed as time goes by, and two adapters compare the same at any time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

from loraplex_server.adapters.residency.record import Record

NEVER_USED = -math.inf
"""Popularity of an adapter that nobody ever asked for."""


class Popularity:
    """Counts uses.

    Args:
        half_life: uses, of any adapters, after which one counts half.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._uses = 0

    def used(self, record: Record) -> None:
        """`record` was asked for."""
        self._uses += 1
        now = self._uses / self._half_life
        high, low = max(record.popularity, now), min(record.popularity, now)
        record.popularity = high + math.log2(1 + 2 ** (low - high))


class LeastPopularFirst:
    """A set of records that gives the least popular ones first; popularity may grow meanwhile.

    A heap in which a record stands where it was when it was last seen: popularity never falls, so a record
    whose place is out of date only has to be put back further down.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Record]] = []
        self._tickets: dict[Record, int] = {}
        self._counter = itertools.count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, record: object) -> bool:
        return record in self._tickets

    def __iter__(self) -> Iterator[Record]:
        """All records, in no particular order."""
        return iter(self._tickets)

    def add(self, record: Record) -> None:
        """Puts a record in."""
        ticket = self._tickets[record] = next(self._counter)
        heapq.heappush(self._heap, (record.popularity, ticket, record))

    def discard(self, record: Record) -> None:
        """Takes a record out."""
        del self._tickets[record]
        if len(self._heap) > 64 + 2 * len(self._tickets):
            self._heap = [entry for entry in self._heap if self._tickets.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def pop(self) -> Record | None:
        """Takes the least popular record out; of equally popular ones the one that came first."""
        heap = self._heap
        while heap:
            popularity, ticket, record = heap[0]
            if self._tickets.get(record) != ticket:
                heapq.heappop(heap)
            elif record.popularity > popularity:
                heapq.heapreplace(heap, (record.popularity, ticket, record))
            else:
                heapq.heappop(heap)
                del self._tickets[record]
                return record
        return None
