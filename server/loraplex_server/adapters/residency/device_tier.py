"""Room on the device: slots and extents of the pool, given to adapters and taken back from idle ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from loraplex_kernels.pool import ALIGNMENT, MAX_RANK, RANK_ALIGN, LoraPool, extent_alignment
from loraplex_server.adapters.residency.arena import Arena, Move
from loraplex_server.adapters.residency.record import Record
from loraplex_server.adapters.spec.sites import SiteKind, SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.errors import InvalidArgumentError

MAX_SLOTS = 256
"""Most adapters on the device where the operator set no cap; the tables have a row for each."""

_STAGING_ELEMENTS = 1 << 22
"""Elements that are moved at once within the arena where source and target overlap: 8 MiB in 16 bits."""


class DeviceTier:
    """The pool, and which adapter has which part of it. Those leave first that nobody waits for, the least
    asked for before others.

    A record that has a slot has an extent too; it is `resident` once a worker has filled it. Methods run on
    the thread that launches the steps, between steps: moves and table writes go to its current stream.

    Args:
        capacity_bytes: size of the arena; the tables come on top.
        dtype: what the op computes in, and what adapters are held in unless `scaled` asks for 8 bits.
        max_adapters: most slots; 0 is no cap beyond `MAX_SLOTS`.
        evicted: told of each adapter that leaves because another needs the room.

    Raises:
        InvalidArgumentError: not even the smallest adapter fits.
    """

    def __init__(
        self,
        sites: SiteRegistry,
        *,
        capacity_bytes: int,
        max_adapters: int,
        device: torch.device,
        dtype: torch.dtype,
        max_rank: int = MAX_RANK,
        scaled: bool = False,
        evicted: Callable[[Record], None],
    ) -> None:
        self._evicted = evicted
        itemsize, alignment = dtype.itemsize, extent_alignment(sites.row_lengths)
        if scaled:
            itemsize, alignment = torch.int8.itemsize, ALIGNMENT
        self._arena = Arena(capacity_bytes // itemsize, alignment)
        projections = sites.of_kind(SiteKind.PROJECTION)
        smallest = min((RANK_ALIGN * (e.in_features + e.out_features) for e in projections), default=1)
        most = self._arena.capacity // self._arena.padded(smallest)
        if not most:
            raise InvalidArgumentError.field(
                "adapter_device_bytes", f"{capacity_bytes} bytes hold no adapter of this model"
            )
        self.num_slots = min(max_adapters or MAX_SLOTS, most)
        self.pool = LoraPool.allocate(
            num_elements=self._arena.capacity,
            num_slots=self.num_slots,
            num_entries=len(sites),
            dtype=dtype,
            device=device,
            max_rank=max_rank,
            scaled=scaled,
            num_projections=len(projections),
        )
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self._placed: dict[Record, None] = {}

    @property
    def alignment(self) -> int:
        """Extents begin at multiples of this many elements."""
        return self._arena.alignment

    @property
    def capacity_units(self) -> int:
        return self._arena.capacity

    @property
    def used_units(self) -> int:
        return self._arena.used_units

    @property
    def records(self) -> Collection[Record]:
        """Every record with a slot, the least asked for first."""
        return sorted(self._placed, key=lambda record: record.popularity)

    def padded(self, num_elements: int) -> int:
        """The units that an adapter of `num_elements` takes."""
        return self._arena.padded(num_elements)

    def could_fit(self, records: Iterable[Record]) -> bool:
        """True if all of these could be on the device together, with nothing else."""
        together = set(records)
        return (
            sum(record.units for record in together) <= self.capacity_units
            and len(together) <= self.num_slots
        )

    def place(self, missing: Sequence[Record], keep: Iterable[Record] = ()) -> bool:
        """Gives each record, all without a slot yet, a slot and an extent; all or none.

        Idle adapters that are not in `keep` are evicted as far as needed, those last that nothing could bring
        back, and extents are moved together where the free room is in pieces. False can mean that an extent
        being filled is in the way.
        """
        kept = set(keep)
        idle = [r for r in self._placed if r.resident and not r.wanted_on_device and r not in kept]
        units = sum(record.units for record in missing)
        if self._arena.free_units + sum(record.units for record in idle) < units:
            return False
        if len(self._free_slots) + len(idle) < len(missing):
            return False
        idle.sort(key=_worth)
        while self._arena.free_units < units or len(self._free_slots) < len(missing):
            victim = idle.pop(0)
            victim.evictions += 1
            self.vacate(victim)
            self._evicted(victim)
        starts = self._allocate(missing)
        if starts is None:
            self._compact()
            starts = self._allocate(missing)
        if starts is None:
            return False
        for record, start in zip(missing, starts, strict=True):
            record.slot, record.start = self._free_slots.pop(), start
            self._placed[record] = None
        return True

    def arrived(self, record: Record) -> None:
        """The extent of `record` is filled: from the next step on its slot serves it."""
        record.resident = True
        self._bind(record)

    def vacate(self, record: Record) -> None:
        """Takes slot and extent back. No step and no worker may still use them."""
        assert record.slot is not None
        assert not record.copying
        if record.resident:
            self.pool.clear(record.slot)
        record.resident = False
        self._arena.free(record.start)
        self._free_slots.append(record.slot)
        record.slot = None
        del self._placed[record]

    def check_integrity(self, records: Iterable[Record]) -> list[str]:
        """One line for each broken invariant of slots, extents and tables, given all records there are."""
        problems = self._arena.check_integrity()
        placed = [record for record in records if record.slot is not None]
        slots = sorted([*self._free_slots, *(record.slot for record in placed if record.slot is not None)])
        if slots != list(range(self.num_slots)):
            problems.append(f"slots: free and used ones are {slots}")
        if self._arena.extents != {record.start: record.units for record in placed}:
            problems.append("arena: its extents are not those of the adapters with a slot")
        if set(self._placed) != set(placed):
            problems.append("device: it does not list the adapters with a slot")
        for record in placed:
            if record.resident and not self._points_at(record):
                problems.append(f"adapter {record.name!r}: slot {record.slot} does not point at its extent")
        used = [record.slot for record in placed if record.resident]
        for slot in set(range(self.num_slots)) - set(used):
            if self.pool.host.rank[slot].any():
                problems.append(f"slot {slot}: serves no adapter, but its ranks are not 0")
        for table in ("a_offset", "b_offset", "rank"):
            if not torch.equal(
                getattr(self.pool, table).cpu(), torch.from_numpy(getattr(self.pool.host, table))
            ):
                problems.append(f"pool: {table} differs between host and device")
        return problems

    def _allocate(self, records: Sequence[Record]) -> list[int] | None:
        starts: list[int] = []
        for record in records:
            start = self._arena.allocate(record.units)
            if start is None:
                for taken in starts:
                    self._arena.free(taken)
                return None
            starts.append(start)
        return starts

    def _compact(self) -> None:
        placed = {record.start: record for record in self._placed}
        for move in self._arena.compact([start for start, record in placed.items() if record.copying]):
            record = placed[move.source]
            record.start = move.target
            if record.resident:
                _carry_out(move, self.pool.arena)
                self._bind(record)

    def _bind(self, record: Record) -> None:
        assert record.slot is not None
        self.pool.bind(record.slot, record.start, record.layout)

    def _points_at(self, record: Record) -> bool:
        host, layout = self.pool.host, record.layout
        entries = [shape.entry for shape in layout.entries]
        found = [table[record.slot, entries].tolist() for table in (host.rank, host.a_offset, host.b_offset)]
        expected = [
            [shape.rank for shape in layout.entries],
            [record.start + offset for offset in layout.a_offset],
            [record.start + offset for offset in layout.b_offset],
        ]
        return found == expected and int((host.rank[record.slot] > 0).sum()) == len(entries)


def _worth(record: Record) -> tuple[bool, bool, float]:
    """Evicted first is what has the least: what nothing could bring back, or somebody waits for, stays."""
    return record.irreplaceable and record.blob is None, record.references > 0, record.popularity


def _carry_out(move: Move, arena: torch.Tensor) -> None:
    """Moves elements within the arena, front to back, so that the ranges may overlap."""
    apart = move.source - move.target >= move.size
    step = move.size if apart else _STAGING_ELEMENTS
    for offset in range(0, move.size, step):
        size = min(step, move.size - offset)
        source = arena[move.source + offset : move.source + offset + size]
        arena[move.target + offset : move.target + offset + size].copy_(source if apart else source.clone())


def planned_pool(sites: SiteRegistry, config: AdapterConfig, dtype: torch.dtype) -> LoraPool:
    """The pool that a store of this configuration will allocate, on the meta device: it takes no memory."""
    return DeviceTier(
        sites,
        capacity_bytes=config.device_bytes,
        max_adapters=config.max_on_device,
        device=torch.device("meta"),
        dtype=dtype,
        scaled=config.device_dtype == "int8",
        evicted=lambda _: None,
    ).pool
