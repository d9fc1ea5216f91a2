"""The adapter cache: which adapters there are, where each one lies, and who uses it.

    disk ──read──▶ host memory ──copy──▶ device arena
    UNLOADED  LOADING   HOST      COPYING    DEVICE

Everything here runs on one thread, the engine's: reading and copying happen on two workers, whose outcomes
`poll` takes up between steps. So a step sees an adapter whole or not at all, and nothing needs a lock.

Two kinds of reference keep an adapter alive. A *registry* reference (`resolve` … `release`) belongs to a
request from admission to its end: the adapter is not forgotten. A *device* reference (`reserve` …
`unreserve`) belongs to a request that runs or waits with its room set aside: the adapter is not evicted. A
request reserves all its adapters or none, so requests cannot hold each other up.

Both tiers evict the least recently used first, by bytes. A host copy may go while the device copy stays. Two
names with the same content are two adapters, each with a slot of its own.

A version of an adapter never changes. Reloading weights that differ from those first read is an error, since
what was computed with the old ones may still be in use; unload and load to get a new version.
"""

from __future__ import annotations

import builtins
import collections
import dataclasses
import enum
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from loraplex_kernels.lora.layouts import MAX_RANK, AdapterLayout, LoraPool, extent_alignment

from loraplex_server.adapters.arena import Arena, Move
from loraplex_server.adapters.manifest import AdapterManifest, read_manifest, refusal
from loraplex_server.adapters.sites import SiteRegistry
from loraplex_server.adapters.sources import CONFIG_FILE, Stamp, check_name, resolve_folder, stamp
from loraplex_server.adapters.weights import HostBlob, lay_out, read_weights
from loraplex_server.adapters.workers import DeviceCopier, Outcome, Worker
from loraplex_server.config import AdapterConfig
from loraplex_server.engine.messages import AdapterStatus, SwapRecord
from loraplex_server.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)

_log = logging.getLogger(__name__)

MAX_SLOTS = 256
"""Adapters on the device where the operator set no cap."""

_READS_IN_FLIGHT = 2
"""One that runs and one that waits, so that the reader never idles and the order stays ours to choose."""

_MAX_SWAP_RECORDS = 4096
_STAGING_ELEMENTS = 1 << 22

StatusCallback = Callable[[AdapterStatus | ServerError], None]


class AdapterState(enum.StrEnum):
    """Where an adapter is; names as in `loraplex.v1.AdapterState`."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    HOST = "host"
    COPYING = "copying"
    DEVICE = "device"


class Readiness(enum.Enum):
    """What a request that wants its adapters gets.

    READY: all are on the device. LOADING: room is set aside, ask `is_ready` after the next `poll`. BLOCKED:
    there is no room now and nothing is held, reserve again later. FAILED: see `AdapterStore.failure`.
    """

    READY = "ready"
    LOADING = "loading"
    BLOCKED = "blocked"
    FAILED = "failed"


class AdapterHandle:
    """One request's reference to one version of an adapter; made by `resolve`, ended by `release`."""

    __slots__ = ("_counted", "_group", "_record", "_reserved")

    def __init__(self, record: _Record, group: tuple[_Record, ...]) -> None:
        self._record = record
        self._group = group
        self._reserved = False
        self._counted = False

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def content_hash(self) -> str:
        """Identity of the weights and configuration; "" until they were first read, set once READY."""
        return self._record.content_hash

    def __repr__(self) -> str:
        return f"AdapterHandle({self.name!r}, reserved={self._reserved})"


@dataclasses.dataclass(eq=False)
class _Record:
    """One version of an adapter. `slot` and `start` are set together, when room is given to it."""

    name: str
    source: str
    manifest: AdapterManifest
    layout: AdapterLayout
    units: int
    host_bytes: int
    content_hash: str = ""
    blob: HostBlob | None = None
    reading: bool = False
    slot: int | None = None
    start: int = 0
    copying: bool = False
    resident: bool = False
    pinned: bool = False
    draining: bool = False
    retired: bool = False
    error: ServerError | None = None
    references: int = 0
    device_references: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    on_loaded: StatusCallback | None = None
    on_pinned: list[StatusCallback] = dataclasses.field(default_factory=list)
    on_drained: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    @property
    def state(self) -> AdapterState:
        if self.resident:
            return AdapterState.DEVICE
        if self.copying:
            return AdapterState.COPYING
        if self.blob is not None:
            return AdapterState.HOST
        return AdapterState.LOADING if self.reading else AdapterState.UNLOADED

    @property
    def idle(self) -> bool:
        """Whether it may leave the device."""
        return self.resident and not self.device_references and not self.pinned


@dataclasses.dataclass(frozen=True)
class _Inspection:
    """A `load` whose files are being looked at."""

    source: str
    done: StatusCallback


@dataclasses.dataclass(frozen=True)
class _Broken:
    """A registered adapter that cannot be served, and what its files looked like then."""

    source: str
    error: ServerError
    stamp: Stamp

    def may_have_healed(self) -> bool:
        lasting = FailedPreconditionError | PermissionDeniedError | NotFoundError | InvalidArgumentError
        return not isinstance(self.error, lasting) or stamp(Path(self.source)) != self.stamp


class AdapterStore:
    """All adapters of one engine. Every method belongs to the engine's thread.

    Args:
        registry: the sites of the base model.
        dtype: of the arena; float32, float16 or bfloat16.
        max_rank: largest rank that is served.
        wake: called from a worker when there is something to `poll`; must be quick and thread-safe.

    Raises:
        InvalidArgumentError: the device or host budget holds no adapter at all.
    """

    def __init__(
        self,
        registry: SiteRegistry,
        config: AdapterConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        max_rank: int = MAX_RANK,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._registry = registry
        self._config = config
        self._dtype = dtype
        self._max_rank = max_rank
        self._wake = wake
        device = torch.device(device)
        self._pin_memory = device.type == "cuda"

        self._arena = Arena(config.device_bytes // dtype.itemsize, extent_alignment(registry.row_lengths))
        smallest = min(
            (self._arena.padded(8 * (e.in_features + e.out_features)) for e in registry), default=1
        )
        most = self._arena.capacity // smallest
        if not most:
            raise InvalidArgumentError.field(
                "adapter_device_bytes", f"{config.device_bytes} bytes hold no adapter of this model"
            )
        num_slots = min(config.max_on_device or MAX_SLOTS, most)
        self._pool = LoraPool.allocate(
            num_elements=self._arena.capacity,
            num_slots=num_slots,
            num_entries=len(registry),
            dtype=dtype,
            device=device,
            max_rank=max_rank,
        )
        self._free_slots = list(range(num_slots - 1, -1, -1))

        self._records: dict[str, _Record] = {}
        self._inspecting: dict[str, _Inspection] = {}
        self._broken: dict[str, _Broken] = {}
        self._retired: set[_Record] = set()
        self._handles: set[AdapterHandle] = set()
        # Least recently used first. On the device: all with a slot. In host memory: all with a blob.
        self._on_device: collections.OrderedDict[_Record, None] = collections.OrderedDict()
        self._on_host: collections.OrderedDict[_Record, None] = collections.OrderedDict()
        # Waiting to be read, first come first served; demand before prefetch.
        self._demanded: dict[_Record, None] = {}
        self._prefetched: dict[_Record, None] = {}
        self._waiting_pins: dict[_Record, None] = {}
        self._host_used = 0
        self._reads = 0
        self._hits = 0
        self._misses = 0
        self._swaps: collections.deque[SwapRecord] = collections.deque(maxlen=_MAX_SWAP_RECORDS)

        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._event = threading.Event()
        self._closed = False
        self._reader = Worker("adapter-reader", self._post)
        self._copy_worker = Worker("adapter-copier", self._post)
        self._copier = DeviceCopier(self._pool.arena)

    # What there is

    @property
    def pool(self) -> LoraPool:
        """The device memory that the kernels read; the same object for the store's lifetime."""
        return self._pool

    @property
    def num_slots(self) -> int:
        """Most adapters on the device at once."""
        return self._pool.num_slots

    @property
    def device_bytes_used(self) -> int:
        return self._arena.used_units * self._dtype.itemsize

    @property
    def host_bytes_used(self) -> int:
        """Bytes of host copies, those being read included."""
        return self._host_used

    @property
    def on_device(self) -> tuple[str, ...]:
        """Names of the adapters that can run now, least recently used first."""
        return tuple(record.name for record in self._on_device if record.resident)

    @property
    def on_host(self) -> tuple[str, ...]:
        return tuple(record.name for record in self._on_host)

    @property
    def hits(self) -> int:
        """How often a request found an adapter on the device when it first asked for it."""
        return self._hits

    @property
    def misses(self) -> int:
        return self._misses

    @property
    def busy(self) -> bool:
        """Whether something is being read or copied, so that a `poll` will be due."""
        return bool(self._inspecting or self._reads or any(record.copying for record in self._on_device))

    def references(self) -> int:
        """Registry references of all requests together."""
        return len(self._handles)

    def drain_swaps(self) -> builtins.list[SwapRecord]:
        """Movements since the last call."""
        swaps = list(self._swaps)
        self._swaps.clear()
        return swaps

    def list(self) -> builtins.list[AdapterStatus]:
        """Every adapter, those that drain or are being looked at included, by name."""
        records = [*self._records.values(), *(record for record in self._retired if record.draining)]
        statuses = [self._status(record) for record in records]
        statuses += [_unread_status(name, inspection.source) for name, inspection in self._inspecting.items()]
        return sorted(statuses, key=lambda status: (status.name, status.draining))

    def get(self, name: str) -> AdapterStatus:
        """The adapter of this name; while there is none, one of that name that still drains.

        Raises:
            NotFoundError: there is none.
            ServerError: it was registered but cannot be served; the reason.
        """
        if name in self._broken:
            raise self._broken[name].error
        for status in self.list():
            if status.name == name:
                return status
        raise _not_found(name)

    def broken(self) -> dict[str, ServerError]:
        """Why each registered adapter that cannot be served cannot."""
        return {name: broken.error for name, broken in self._broken.items()}

    # Registering

    def register_folder(self, folder: Path) -> builtins.list[str]:
        """Registers every adapter in `folder`: each subfolder with an `adapter_config.json`.

        One that cannot be served is logged and kept in `broken`, and requests for it get its error.

        Returns:
            The names that can be served, sorted.

        Raises:
            NotFoundError: there is no such folder.
            AlreadyExistsError: a name is taken by an adapter from elsewhere.
        """
        if not folder.is_dir():
            raise NotFoundError(
                f"there is no adapter folder {str(folder)!r}", resource=("folder", str(folder))
            )
        names = []
        for source in sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}")):
            name = source.name
            broken = self._broken.get(name)
            if broken is not None and broken.source != str(source.absolute()):
                raise _taken(name, broken.source, str(source))
            try:
                self.register(name, source.absolute())
            except AlreadyExistsError:
                raise
            except ServerError as error:
                _log.warning("%s", error)
                self._broken[name] = _Broken(str(source.absolute()), error, stamp(source))
                continue
            names.append(name)
        return names

    def register(self, name: str, source: str | Path) -> AdapterStatus:
        """Makes an adapter known. Reads and checks its configuration and header, not its weights.

        Registering the same folder again changes nothing.

        Raises:
            InvalidArgumentError, PermissionDeniedError, NotFoundError: the name or source is bad.
            AlreadyExistsError: the name is taken; the text names both sources.
            FailedPreconditionError: the adapter cannot be served whole, or can never fit.
        """
        check_name(name)
        folder = resolve_folder(source, self._config.allowed_roots)
        taken = self._records.get(name)
        if taken is not None and taken.manifest.folder == folder:
            return self._status(taken)
        self._check_free(name, str(folder))
        record = self._new_record(name, str(source), self._inspect(name, folder))
        self._broken.pop(name, None)
        self._records[name] = record
        return self._status(record)

    def load(self, name: str, source: str, done: StatusCallback) -> None:
        """Registers an adapter and brings it to host memory, in the background.

        `done` is called from `poll` with its status, or with the error for which nothing was registered.

        Raises:
            InvalidArgumentError: the name is bad.
            AlreadyExistsError: the name is taken.
        """
        check_name(name)
        self._check_free(name, source)
        inspection = _Inspection(source, done)
        self._inspecting[name] = inspection

        def inspect() -> AdapterManifest:
            return self._inspect(name, resolve_folder(source, self._config.allowed_roots))

        def inspected(outcome: Outcome[AdapterManifest]) -> None:
            if self._inspecting.get(name) is not inspection:
                return
            del self._inspecting[name]
            if outcome.result is None:
                done(outcome.error or InternalError("nothing was read"))
                return
            try:
                record = self._new_record(name, source, outcome.result)
            except ServerError as error:
                done(error)
                return
            self._broken.pop(name, None)
            self._records[name] = record
            record.on_loaded = done
            self._demanded[record] = None

        self._reader.submit(inspect, inspected)

    def unload(self, name: str, done: Callable[[], None]) -> None:
        """Forgets an adapter: requests no longer find it, those that hold it finish.

        `done` is called when its memory is free, at once if nobody holds it. The name may be registered anew
        before that. A pin goes with the adapter; a load under way is cancelled.

        Raises:
            NotFoundError: there is none of this name.
        """
        if name in self._inspecting:
            self._inspecting.pop(name).done(_unloaded(name))
            done()
            return
        if self._broken.pop(name, None) is not None:
            done()
            return
        if name not in self._records:
            raise _not_found(name)
        record = self._records[name]
        record.draining = True
        record.on_drained.append(done)
        self._answer(record, _unloaded(name))
        record.pinned = False
        self._retire(record)

    def pin(self, name: str, pinned: bool, done: StatusCallback) -> None:
        """Keeps an adapter on the device, or lets it go again. `done` is called once it is there, or failed.

        While a pinned adapter waits for room, requests that would need room wait too.

        Raises:
            NotFoundError: there is none of this name.
            FailedPreconditionError: pins would leave too little room for the largest other adapter or for a
                request that is under way.
        """
        record = self._find(name)
        if not pinned:
            record.pinned = False
            self._waiting_pins.pop(record, None)
            callbacks, record.on_pinned = record.on_pinned, []
            for callback in callbacks:
                callback(CancelledError(f"adapter {name!r} was unpinned", resource=("adapter", name)))
            self._settle(record)
            done(self._status(record))
            return
        if not record.pinned:
            self._check_pin(record)
            record.pinned = True
        if record.resident:
            done(self._status(record))
            return
        record.on_pinned.append(done)
        if record.slot is None:
            self._waiting_pins[record] = None
            self._place_pins()

    # Requests

    def resolve(self, names: Sequence[str]) -> tuple[AdapterHandle, ...]:
        """A registry reference to each adapter, for one request; nothing is loaded yet.

        Raises:
            InvalidArgumentError: there are more names than a request may have.
            NotFoundError: there is no such adapter.
            FailedPreconditionError: they can never be on the device together, or one cannot be served.
        """
        if len(names) > self._config.max_per_request:
            raise InvalidArgumentError.field(
                "adapters", f"{len(names)} adapters; a request may name {self._config.max_per_request}"
            )
        records = tuple(self._find(name) for name in names)
        self._check_fits(records, "the adapters of this request", "the request")
        handles = tuple(AdapterHandle(record, records) for record in records)
        for handle in handles:
            handle._record.references += 1
            self._handles.add(handle)
        return handles

    def release(self, handles: Iterable[AdapterHandle]) -> None:
        """Ends references, device references that are still held included. Each handle is released once."""
        handles = tuple(handles)
        self.unreserve(handles)
        for handle in handles:
            if handle not in self._handles:
                raise InternalError(f"{handle} was released twice")
            self._handles.remove(handle)
            record = handle._record
            record.references -= 1
            if not record.references:
                self._prefetched.pop(record, None)
            self._settle(record)

    def reserve(self, handles: Sequence[AdapterHandle]) -> Readiness:
        """Asks for all adapters of a request on the device; never waits, and takes all or nothing.

        READY and LOADING hold a device reference to each until `unreserve`; BLOCKED and FAILED hold nothing.
        BLOCKED still has what is missing read into host memory, as far as there is room.
        """
        records = self._distinct(handles)
        if any(handle._reserved for handle in handles):
            raise InternalError("an adapter is reserved already")
        self._count(handles)
        if any(record.error for record in records):
            return Readiness.FAILED
        missing = [record for record in records if record.slot is None]
        if missing and (self._waiting_pins or not self._place(missing, keep=records)):
            self._prefetch(missing)
            return Readiness.BLOCKED
        for handle in handles:
            handle._reserved = True
            handle._record.device_references += 1
        for record in records:
            self._on_device.move_to_end(record)
        for record in missing:
            self._fetch(record)
        return self.is_ready(handles)

    def is_ready(self, handles: Sequence[AdapterHandle]) -> Readiness:
        """READY, LOADING or FAILED, for handles that are reserved. FAILED keeps the references, too."""
        if not all(handle._reserved for handle in handles):
            raise InternalError("an adapter is not reserved")
        if any(handle._record.error for handle in handles):
            return Readiness.FAILED
        return Readiness.READY if all(handle._record.resident for handle in handles) else Readiness.LOADING

    def unreserve(self, handles: Iterable[AdapterHandle]) -> None:
        """Gives device references back; handles without one are left alone."""
        for handle in handles:
            if handle._reserved:
                handle._reserved = False
                record = handle._record
                record.device_references -= 1
                if record in self._on_device:
                    self._on_device.move_to_end(record)
                self._settle(record)

    def failure(self, handles: Iterable[AdapterHandle]) -> ServerError | None:
        """Why a request cannot have its adapters."""
        return next((handle._record.error for handle in handles if handle._record.error), None)

    def slot(self, handle: AdapterHandle) -> int:
        """The pool's slot of an adapter that is reserved and READY; the same until it is unreserved."""
        slot = handle._record.slot
        if slot is None or not handle._reserved or not handle._record.resident:
            raise InternalError(f"{handle} is not on the device")
        return slot

    # The engine's loop

    def poll(self) -> bool:
        """Takes up what the workers finished and gives them more to do. Call it between steps; never waits.

        Returns:
            Whether anything had finished.
        """
        self._event.clear()
        finished = False
        while self._posted:
            self._posted.popleft()()
            finished = True
        self._place_pins()
        self._dispatch()
        return finished

    def wait_event(self, timeout_s: float | None) -> bool:
        """Waits until a worker has finished something, for an engine that is idle."""
        return self._event.wait(timeout_s)

    def close(self) -> None:
        """Stops the workers, after what they are at, and answers whoever still waits with UNAVAILABLE."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        self._copy_worker.close()
        error = UnavailableError("the engine stops")
        for inspection in self._inspecting.values():
            inspection.done(error)
        self._inspecting.clear()
        for record in [*self._records.values(), *self._retired]:
            self._answer(record, error)

    def check_integrity(self) -> builtins.list[str]:
        """One line for each broken invariant of slots, bytes, tables and references."""
        problems = self._arena.check_integrity()
        records = [*self._records.values(), *self._retired]
        placed = [record for record in records if record.slot is not None]
        slots = sorted([*self._free_slots, *(record.slot for record in placed if record.slot is not None)])
        if slots != list(range(self.num_slots)):
            problems.append(f"slots: free and used ones are {slots}")
        if self._arena.extents != {record.start: record.units for record in placed}:
            problems.append("arena: its extents are not those of the adapters with a slot")
        if set(self._on_device) != set(placed):
            problems.append("device: the eviction order does not list the adapters with a slot")
        if set(self._on_host) != {record for record in records if record.blob is not None}:
            problems.append("host: the eviction order does not list the adapters with a host copy")
        host_used = sum(record.host_bytes for record in records if record.blob is not None or record.reading)
        if host_used != self._host_used or host_used > self._config.host_bytes:
            problems.append(f"host: {self._host_used} bytes counted, {host_used} in use")
        counted = collections.Counter(handle._record for handle in self._handles)
        reserved = collections.Counter(handle._record for handle in self._handles if handle._reserved)
        for record in records:
            problems += self._check_record(record, counted[record], reserved[record])
        for slot in self._free_slots:
            if self._pool.host.rank[slot].any():
                problems.append(f"slot {slot}: free, but its ranks are not 0")
        for table in ("a_offset", "b_offset", "rank"):
            on_device = getattr(self._pool, table).cpu()
            if not torch.equal(on_device, torch.from_numpy(getattr(self._pool.host, table))):
                problems.append(f"pool: {table} differs between host and device")
        return problems

    def _check_record(self, record: _Record, references: int, device_references: int) -> builtins.list[str]:
        problems = []
        label = f"adapter {record.name!r}"
        if (record.references, record.device_references) != (references, device_references):
            problems.append(
                f"{label}: counts {record.references}/{record.device_references} references, "
                f"{references}/{device_references} are held"
            )
        if record.copying and (record.slot is None or record.blob is None or record.resident):
            problems.append(f"{label}: copied without a slot or a host copy")
        if record.resident:
            problems += self._check_tables(record)
        if record.retired and not (record.references or record.copying or record.reading):
            problems.append(f"{label}: unused, but not freed")
        return problems

    def _check_tables(self, record: _Record) -> builtins.list[str]:
        if record.slot is None:
            return [f"adapter {record.name!r}: on the device without a slot"]
        host, layout = self._pool.host, record.layout
        entries = [shape.entry for shape in layout.entries]
        found = [table[record.slot, entries].tolist() for table in (host.rank, host.a_offset, host.b_offset)]
        expected = [
            [shape.rank for shape in layout.entries],
            [record.start + offset for offset in layout.a_offset],
            [record.start + offset for offset in layout.b_offset],
        ]
        if found != expected or int((host.rank[record.slot] > 0).sum()) != len(entries):
            return [f"adapter {record.name!r}: slot {record.slot} does not point at its extent"]
        return []

    # Making and ending records

    def _inspect(self, name: str, folder: Path) -> AdapterManifest:
        return read_manifest(name, folder, self._registry, self._config.allowed_roots, self._max_rank)

    def _new_record(self, name: str, source: str, manifest: AdapterManifest) -> _Record:
        layout = lay_out(manifest, self._arena.alignment)
        host_bytes = layout.num_elements * self._dtype.itemsize
        record = _Record(name, source, manifest, layout, self._arena.padded(layout.num_elements), host_bytes)
        itemsize = self._dtype.itemsize
        for option, needed, budget in (
            ("--adapter-device-bytes", record.units * itemsize, self._arena.capacity * itemsize),
            ("--adapter-host-bytes", host_bytes, self._config.host_bytes),
        ):
            if needed > budget:
                raise refusal(name, f"it takes {needed} bytes of {budget}; give the server more {option}")
        return record

    def _check_free(self, name: str, source: str) -> None:
        taken: str | None = None
        if name in self._records:
            taken = self._records[name].source
        elif name in self._inspecting:
            taken = self._inspecting[name].source
        if taken is not None:
            raise _taken(name, taken, source)

    def _find(self, name: str) -> _Record:
        record = self._records.get(name)
        if record is not None:
            return record
        broken = self._broken.get(name)
        if broken is None:
            raise _not_found(name)
        if not broken.may_have_healed():
            raise broken.error
        try:
            self.register(name, broken.source)
        except ServerError as error:
            self._broken[name] = _Broken(broken.source, error, stamp(Path(broken.source)))
            raise
        return self._records[name]

    def _retire(self, record: _Record) -> None:
        """Takes a version out of the registry; it is freed when nobody holds it."""
        if self._records.get(record.name) is record:
            del self._records[record.name]
        self._retired.add(record)
        record.retired = True
        self._waiting_pins.pop(record, None)
        self._prefetched.pop(record, None)
        if not record.device_references:
            self._demanded.pop(record, None)
        self._settle(record)

    def _fail(self, record: _Record, error: ServerError) -> None:
        """Ends a version: all who hold it get `error`, the next request may try the files again."""
        record.error = error
        record.pinned = False
        admitted = record.on_loaded is None
        self._answer(record, error)
        if admitted and not record.retired:
            folder = record.manifest.folder
            self._broken[record.name] = _Broken(str(folder), error, stamp(folder))
        self._retire(record)

    def _settle(self, record: _Record) -> None:
        """Frees what nobody needs any more, after a reference or a worker has let go of it."""
        unwanted = not record.device_references and not record.pinned
        if record.slot is not None and unwanted and not record.resident and not record.copying:
            self._vacate(record)
            if record in self._demanded and record.on_loaded is None:
                del self._demanded[record]
                if record.references:
                    self._prefetched[record] = None
        if record.retired and not (record.references or record.copying or record.reading):
            if record.slot is not None:
                self._vacate(record)
            if record.blob is not None:
                self._drop_host_copy(record)
            self._retired.discard(record)
            callbacks, record.on_drained = record.on_drained, []
            for callback in callbacks:
                callback()

    def _answer(self, record: _Record, answer: AdapterStatus | ServerError) -> None:
        """Calls back whoever loads or pins `record`."""
        callbacks = [*record.on_pinned, *([record.on_loaded] if record.on_loaded else [])]
        record.on_pinned, record.on_loaded = [], None
        for callback in callbacks:
            callback(answer)

    # Room on the device

    def _place(self, missing: Sequence[_Record], keep: Iterable[_Record] = ()) -> bool:
        """Gives each record a slot and an extent, evicting idle adapters; all or none."""
        kept = set(keep)
        idle = [record for record in self._on_device if record.idle and record not in kept]
        units = sum(record.units for record in missing)
        if self._arena.free_units + sum(record.units for record in idle) < units:
            return False
        if len(self._free_slots) + len(idle) < len(missing):
            return False
        while self._arena.free_units < units or len(self._free_slots) < len(missing):
            self._evict(idle.pop(0))
        starts = self._allocate(missing)
        if starts is None:
            self._compact()
            starts = self._allocate(missing)
        if starts is None:
            # Copies in flight cannot be moved and lie in the way; they end soon.
            return False
        for record, start in zip(missing, starts, strict=True):
            record.slot, record.start = self._free_slots.pop(), start
            self._on_device[record] = None
        return True

    def _allocate(self, records: Sequence[_Record]) -> builtins.list[int] | None:
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
        placed = {record.start: record for record in self._on_device}
        moves = self._arena.compact([start for start, record in placed.items() if record.copying])
        for move in moves:
            record = placed[move.source]
            record.start = move.target
            if record.resident:
                _move(self._pool.arena, move)
                self._bind(record)

    def _bind(self, record: _Record) -> None:
        assert record.slot is not None
        self._pool.bind(record.slot, record.start, record.layout)

    def _evict(self, record: _Record) -> None:
        record.evictions += 1
        self._swaps.append(SwapRecord("evict_device", record.name, 0.0, record.host_bytes))
        self._vacate(record)

    def _vacate(self, record: _Record) -> None:
        """Takes slot and extent away from a record that no step and no copy uses."""
        assert record.slot is not None
        assert not record.copying
        if record.resident:
            self._pool.clear(record.slot)
        record.resident = False
        self._arena.free(record.start)
        self._free_slots.append(record.slot)
        record.slot = None
        del self._on_device[record]

    def _place_pins(self) -> None:
        for record in list(self._waiting_pins):
            if record.slot is None and not self._place([record]):
                return
            del self._waiting_pins[record]
            self._fetch(record)

    def _check_pin(self, record: _Record) -> None:
        pinned = {record, *(other for other in self._records.values() if other.pinned)}
        others = [other for other in self._records.values() if other not in pinned]
        groups = {handle._group for handle in self._handles}
        groups.add((max(others, key=lambda other: other.units),) if others else ())
        for group in groups:
            names = ", ".join(sorted({member.name for member in group} - {record.name}))
            self._check_fits(
                [*group, *pinned], f"{record.name!r} pinned and {names or 'nothing'} beside it", "the pin"
            )

    def _check_fits(self, records: Iterable[_Record], what: str, whose: str) -> None:
        pinned = [record for record in self._records.values() if record.pinned]
        together = {*records, *pinned}
        needed = sum(record.units for record in together)
        if needed <= self._arena.capacity and len(together) <= self.num_slots:
            return
        itemsize = self._dtype.itemsize
        raise FailedPreconditionError(
            f"{what} need {len(together)} slots and {needed * itemsize} bytes on the device, pinned ones "
            f"included; it has {self.num_slots} slots and {self._arena.capacity * itemsize} bytes, "
            f"so {whose} is refused"
        )

    # Disk to host, host to device

    def _prefetch(self, records: Iterable[_Record]) -> None:
        for record in records:
            if record.blob is None and not record.reading and record not in self._demanded:
                self._prefetched[record] = None
        self._dispatch()

    def _fetch(self, record: _Record) -> None:
        """Goes on with bringing in a record that has room on the device."""
        if record.resident or record.copying:
            return
        if record.blob is not None:
            self._copy(record, record.blob)
        elif not record.reading:
            self._prefetched.pop(record, None)
            self._demanded[record] = None
            self._dispatch()

    def _dispatch(self) -> None:
        """Starts reads while the reader has little to do and there is host memory for them."""
        while self._reads < _READS_IN_FLIGHT and not self._closed and (self._demanded or self._prefetched):
            demanded = bool(self._demanded)
            waiting = self._demanded if demanded else self._prefetched
            record = next(iter(waiting))
            if not self._make_host_room(record.host_bytes, demanded):
                return
            del waiting[record]
            self._read(record)

    def _make_host_room(self, needed: int, demanded: bool) -> bool:
        """Evicts host copies; a prefetch takes only those of adapters that no request holds."""
        room = self._config.host_bytes - self._host_used
        victims: list[_Record] = []
        for record in self._on_host:
            if room >= needed:
                break
            if not record.copying and (demanded or not record.references):
                victims.append(record)
                room += record.host_bytes
        if room < needed:
            return False
        for record in victims:
            self._swaps.append(SwapRecord("evict_host", record.name, 0.0, record.host_bytes))
            self._drop_host_copy(record)
        return True

    def _drop_host_copy(self, record: _Record) -> None:
        record.blob = None
        self._host_used -= record.host_bytes
        del self._on_host[record]

    def _read(self, record: _Record) -> None:
        record.reading = True
        self._reads += 1
        self._host_used += record.host_bytes
        manifest, layout, roots = record.manifest, record.layout, self._config.allowed_roots

        def read() -> HostBlob:
            return read_weights(manifest, layout, self._dtype, roots, pin_memory=self._pin_memory)

        self._reader.submit(read, lambda outcome: self._was_read(record, outcome))

    def _was_read(self, record: _Record, outcome: Outcome[HostBlob]) -> None:
        record.reading = False
        self._reads -= 1
        blob, error = outcome.result, outcome.error
        if blob is not None and record.content_hash not in ("", blob.content_hash):
            error = refusal(record.name, "its weights were changed on disk; unload it and load it anew")
        if blob is None or error is not None:
            self._host_used -= record.host_bytes
            self._fail(record, error or InternalError("nothing was read"))
            return
        record.blob = blob
        record.content_hash = blob.content_hash
        self._on_host[record] = None
        self._swaps.append(SwapRecord("load", record.name, outcome.seconds, record.host_bytes))
        if record.on_loaded is not None:
            callback, record.on_loaded = record.on_loaded, None
            callback(self._status(record))
        if record.slot is not None:
            self._copy(record, blob)
        self._settle(record)

    def _copy(self, record: _Record, blob: HostBlob) -> None:
        record.copying = True
        self._on_host.move_to_end(record)
        job = self._copier.prepare(record.start, blob.data)
        self._copy_worker.submit(job, lambda outcome: self._was_copied(record, outcome))

    def _was_copied(self, record: _Record, outcome: Outcome[None]) -> None:
        record.copying = False
        if outcome.error is not None:
            self._fail(record, outcome.error)
            return
        record.resident = True
        self._bind(record)
        self._swaps.append(SwapRecord("copy", record.name, outcome.seconds, record.host_bytes))
        callbacks, record.on_pinned = record.on_pinned, []
        for callback in callbacks:
            callback(self._status(record))
        self._settle(record)

    # Small things

    def _post(self, call: Callable[[], None]) -> None:
        self._posted.append(call)
        self._event.set()
        if self._wake is not None:
            self._wake()

    def _distinct(self, handles: Iterable[AdapterHandle]) -> builtins.list[_Record]:
        return list(dict.fromkeys(handle._record for handle in handles))

    def _count(self, handles: Iterable[AdapterHandle]) -> None:
        for handle in handles:
            if not handle._counted:
                handle._counted = True
                if handle._record.resident:
                    handle._record.hits += 1
                    self._hits += 1
                else:
                    handle._record.misses += 1
                    self._misses += 1

    def _status(self, record: _Record) -> AdapterStatus:
        return AdapterStatus(
            name=record.name,
            source=record.source,
            state=record.state.value,
            pinned=record.pinned,
            peft_type=record.manifest.peft_type,
            rank=record.manifest.rank,
            target_modules=record.manifest.target_modules,
            bytes=record.host_bytes,
            content_hash=record.content_hash,
            references=record.references,
            draining=record.draining,
            hits=record.hits,
            misses=record.misses,
            evictions=record.evictions,
        )


def _move(arena: torch.Tensor, move: Move) -> None:
    """Carries out a move within the arena, front to back, so that it may overlap itself."""
    apart = move.source - move.target >= move.size
    step = move.size if apart else _STAGING_ELEMENTS
    for offset in range(0, move.size, step):
        size = min(step, move.size - offset)
        source = arena[move.source + offset : move.source + offset + size]
        arena[move.target + offset : move.target + offset + size].copy_(source if apart else source.clone())


def _not_found(name: str) -> NotFoundError:
    return NotFoundError(f"there is no adapter {name!r}", resource=("adapter", name))


def _taken(name: str, source: str, other: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"adapter {name!r} is registered from {source!r} and cannot come from {other!r} too",
        resource=("adapter", name),
    )


def _unloaded(name: str) -> CancelledError:
    return CancelledError(f"adapter {name!r} was unloaded", resource=("adapter", name))


def _unread_status(name: str, source: str) -> AdapterStatus:
    return AdapterStatus(
        name=name,
        source=source,
        state=AdapterState.LOADING.value,
        pinned=False,
        peft_type="",
        rank=0,
        target_modules=(),
        bytes=0,
        content_hash="",
        references=0,
        draining=False,
        hits=0,
        misses=0,
        evictions=0,
    )
