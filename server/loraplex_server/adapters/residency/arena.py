"""Places extents in a flat range. Pure bookkeeping: the caller owns the memory and moves the bytes."""

from __future__ import annotations

import bisect
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """Copy `size` units from `source` down to `target`. The two ranges may overlap; `target` < `source`."""

    source: int
    target: int
    size: int


class Arena:
    """Extents in the units 0..`capacity`, each beginning at a multiple of `alignment` and padded to it.

    Because every extent is a multiple of the alignment, `free_units` can be used to the last one once
    `compact` has run, as long as no extent is immovable.

    Args:
        capacity: rounded down to a multiple of `alignment`.
    """

    def __init__(self, capacity: int, alignment: int = 1) -> None:
        if alignment < 1:
            raise ValueError(f"alignment must be at least 1, got {alignment}")
        self.alignment = alignment
        self.capacity = max(capacity, 0) // alignment * alignment
        self._used: dict[int, int] = {}
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []

    def padded(self, size: int) -> int:
        """The units that an extent of `size` takes."""
        return -(-size // self.alignment) * self.alignment

    @property
    def free_units(self) -> int:
        return sum(size for _, size in self._free)

    @property
    def used_units(self) -> int:
        return sum(self._used.values())

    @property
    def extents(self) -> dict[int, int]:
        """Size by start of every extent in use."""
        return dict(self._used)

    def allocate(self, size: int) -> int | None:
        """Start of a new extent, in the smallest gap that holds it; None if there is none.

        Raises:
            ValueError: `size` is not positive.
        """
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        size = self.padded(size)
        fitting = [(gap, start) for start, gap in self._free if gap >= size]
        if not fitting:
            return None
        gap, start = min(fitting)
        self._free.remove((start, gap))
        if gap > size:
            bisect.insort(self._free, (start + size, gap - size))
        self._used[start] = size
        return start

    def free(self, start: int) -> None:
        """Gives an extent back; its gap joins its neighbours.

        Raises:
            KeyError: no extent begins there.
        """
        end = start + self._used.pop(start)
        index = bisect.bisect(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end - start))

    def compact(self, immovable: Collection[int] = ()) -> list[Move]:
        """Slides extents down to close gaps and returns the moves, to be carried out in this order.

        The bookkeeping is changed at once, so the caller must carry them all out before it reads or writes
        any extent. Extents whose start is in `immovable` stay; gaps below them may remain.
        """
        moves: list[Move] = []
        used: dict[int, int] = {}
        free: list[tuple[int, int]] = []
        end = 0
        for start, size in sorted(self._used.items()):
            target = start if start in immovable else end
            if target > end:
                free.append((end, target - end))
            if target < start:
                moves.append(Move(start, target, size))
            used[target] = size
            end = target + size
        if end < self.capacity:
            free.append((end, self.capacity - end))
        self._used, self._free = used, free
        return moves

    def check_integrity(self) -> list[str]:
        """One line for each broken invariant: extents and joined gaps tile the range, all aligned."""
        problems = []
        pieces = sorted([(start, size, True) for start, size in self._used.items()])
        pieces = sorted([*pieces, *((start, size, False) for start, size in self._free)])
        position, was_gap = 0, False
        for start, size, in_use in pieces:
            if start != position:
                problems.append(f"arena: piece at {start} where {position} was due")
            if size < 1 or start % self.alignment or size % self.alignment:
                problems.append(f"arena: piece at {start} of {size} breaks alignment {self.alignment}")
            if was_gap and not in_use:
                problems.append(f"arena: gap at {start} was not joined to the one before")
            position, was_gap = start + size, not in_use
        if position != self.capacity:
            problems.append(f"arena: pieces end at {position} of {self.capacity}")
        if self._free != sorted(self._free):
            problems.append("arena: gaps are not in order")
        return problems
