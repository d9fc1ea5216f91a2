"""The adapter cache: which adapters there are, where each one lies, and who uses it.

    disk ──read──▶ host memory ──copy──▶ device arena
    UNLOADED  LOADING   HOST      COPYING    DEVICE

Everything here runs on one thread, the engine's: reading and copying happen on two workers, whose outcomes
`poll` takes up between steps. So a step sees an adapter whole or not at all, and nothing needs a lock.

Two kinds of reference keep an adapter alive. A *registry* reference (`resolve` … `release`) belongs to a
request from admission to its end: the adapter is not forgotten. A *device* reference (`reserve` …
`unreserve`) belongs to a request that runs or waits with its room set aside: the adapter is not evicted. A
request reserves all its adapters or none, so requests cannot hold each other up.

Both tiers evict by bytes, the least asked for first, where recent requests count most. A host copy may go
while the device copy stays. Two names with the same content are two adapters, each with a slot of its own.

A version of an adapter never changes. Reading weights again that differ from those first read is an error,
since what was computed with the old ones may still be in use. A new version takes the place of the old one in
one step (`load` in place): it is read and checked beside it, requests that hold the old one finish on it, and
if anything is wrong with the new one, the old one stays.
"""

from __future__ import annotations

import builtins
import collections
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from loraplex_kernels.pool import MAX_RANK, AdapterLayout, LoraPool
from loraplex_server.adapters.files.folder import stamp
from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.files.weights import HostBlob, lay_out, read_weights
from loraplex_server.adapters.origins.composition import Composer, Member, check_member
from loraplex_server.adapters.origins.remote.cache import entry_key
from loraplex_server.adapters.origins.resolver import AdapterSources, Resolver
from loraplex_server.adapters.origins.watch import Change, ChangeKind, FolderWatch
from loraplex_server.adapters.residency.device_tier import DeviceTier
from loraplex_server.adapters.residency.host_tier import HostTier
from loraplex_server.adapters.residency.loading import Loading
from loraplex_server.adapters.residency.pins import Pins
from loraplex_server.adapters.residency.popularity import Popularity
from loraplex_server.adapters.residency.record import (
    AdapterHandle,
    AdapterState,
    Readiness,
    Record,
    StatusCallback,
    unread_status,
)
from loraplex_server.adapters.residency.registration import (
    Broken,
    Inspection,
    log_outcome,
    not_found,
    superseded,
    taken,
    unloaded,
)
from loraplex_server.adapters.residency.workers import Outcome, WorkerPool
from loraplex_server.adapters.spec.manifest import AdapterManifest, Kind
from loraplex_server.adapters.spec.refusals import refusal
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_server.core.adapter_status import AdapterChanges, AdapterStatus, SwapRecord
from loraplex_server.core.composition import Composition
from loraplex_server.core.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.frozen_base import FrozenBase
from loraplex_server.core.names import check_name
from loraplex_server.core.source_uri import redact
from loraplex_server.core.tokenizer_source import TokenizerSource

__all__ = ["AdapterHandle", "AdapterState", "AdapterStore", "Readiness", "StatusCallback"]

_log = logging.getLogger(__name__)

_MAX_SWAP_RECORDS = 4096

_HALF_LIFE = 16
"""Requests a slot after which one counts half for what stays: near the best for Zipf traffic, whether its
favourites stay the same or change."""

_MAX_FETCHES = 64
"""Loads from elsewhere under way at once, those included that wait for one of the downloads allowed."""

_STOP_FETCHES_S = 2.0

_UPLOAD = "upload#sha256="
"""How the source of an adapter begins that a client has sent."""


class AdapterStore:
    """All adapters of one engine. Every method belongs to the engine's thread.

    Args:
        registry: the sites of the base model.
        dtype: what the op computes in: float32, float16 or bfloat16. Adapters are held in it too, unless
            `config.device_dtype` says otherwise.
        base: the base model's weights, for the methods that are relative to them (DoRA).
        max_rank: largest rank that is served.
        wake: called from a worker when there is something to `poll`; must be quick and thread-safe.
        sources: where adapters come from; None makes what `config` describes. Closed with the store.

    Raises:
        InvalidArgumentError: the device budget holds no adapter at all.
        FailedPreconditionError: the allowed sources cannot be served.
    """

    def __init__(
        self,
        registry: SiteRegistry,
        config: AdapterConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        base: FrozenBase | None = None,
        max_rank: int = MAX_RANK,
        wake: Callable[[], None] | None = None,
        sources: Resolver | None = None,
    ) -> None:
        device = torch.device(device)
        self._registry = registry
        self._base = base
        self._config = config
        self._max_rank = max_rank
        self._wake = wake
        self._pin_memory = device.type == "cuda"
        self._device = DeviceTier(
            registry,
            capacity_bytes=config.device_bytes,
            max_adapters=config.max_on_device,
            device=device,
            dtype=dtype,
            max_rank=max_rank,
            scaled=config.device_dtype == "int8",
            evicted=lambda record: self._note("evict_device", record),
        )
        self._dtype = self._device.pool.arena.dtype
        self._sources: Resolver = sources or AdapterSources(config)
        self._composer = Composer(registry, self._sources)
        self._host = HostTier(config.host_bytes, lambda record: self._note("evict_host", record))
        self._popularity = Popularity(_HALF_LIFE * self._device.num_slots)

        self._kinds: weakref.WeakValueDictionary[bytes, Kind] = weakref.WeakValueDictionary()
        self._layouts: weakref.WeakKeyDictionary[Kind, AdapterLayout] = weakref.WeakKeyDictionary()
        self._records: dict[str, Record] = {}
        self._retired: set[Record] = set()
        self._inspecting: dict[str, Inspection] = {}
        # What is to replace a registered adapter: its files are looked at, then it is read.
        self._replacing: dict[str, Inspection] = {}
        self._candidates: dict[str, Record] = {}
        self._broken: dict[str, Broken] = {}
        self._handles: set[AdapterHandle] = set()
        self._hits = 0
        self._misses = 0
        self._swaps: collections.deque[SwapRecord] = collections.deque(maxlen=_MAX_SWAP_RECORDS)

        # Names whose adapters are not as they were, while somebody watches.
        self._changed: set[str] = set()
        self._watched = False

        # Tokenizers of their own, by name, and what is new of them since it was last told.
        self._tokenizers: dict[str, TokenizerSource] = {}
        self._new_tokenizers: dict[str, TokenizerSource | None] = {}

        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._event = threading.Event()
        self._closed = False
        self._pins = Pins(self._device, config.max_pinned, self._dtype.itemsize)
        self._loading = Loading(
            self._host,
            self._device,
            read=self._read,
            was_read=self._was_read,
            was_copied=self._was_copied,
            post=self._post,
        )
        self._fetchers = WorkerPool("adapter-fetcher", _MAX_FETCHES, self._post)
        self._watch: FolderWatch | None = None
        if config.watch_s:
            self._watch = FolderWatch(config.folders, config.watch_s, self._report)

    # What there is

    @property
    def pool(self) -> LoraPool:
        """The device memory that the kernels read; the same object for the store's lifetime."""
        return self._device.pool

    @property
    def num_slots(self) -> int:
        """Most adapters on the device at once."""
        return self._device.num_slots

    @property
    def device_bytes_used(self) -> int:
        """Bytes of the arena in use, room set aside included."""
        return self._device.used_units * self._dtype.itemsize

    @property
    def host_bytes_used(self) -> int:
        """Bytes of host copies, those being read included."""
        return self._host.used_bytes

    @property
    def on_device(self) -> tuple[str, ...]:
        """Names of the adapters that can run now, the least asked for first."""
        return tuple(record.name for record in self._device.records if record.resident)

    @property
    def on_host(self) -> tuple[str, ...]:
        """Names of the adapters with a host copy."""
        return tuple(record.name for record in self._host.records)

    @property
    def hits(self) -> int:
        """How often a request found an adapter on the device when it first asked for it."""
        return self._hits

    @property
    def misses(self) -> int:
        """How often a request did not."""
        return self._misses

    @property
    def busy(self) -> bool:
        """Whether a worker is at something, so that a `poll` will be due."""
        return bool(self._inspecting or self._replacing or self._loading.busy)

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
        statuses = [record.status() for record in records]
        statuses += [unread_status(name, inspection.source) for name, inspection in self._inspecting.items()]
        return sorted(statuses, key=lambda status: (status.name, status.draining))

    def get(self, name: str) -> AdapterStatus:
        """The adapter of this name; while there is none, one of that name that still drains.

        Raises:
            NotFoundError: there is none.
            ServerError: it was registered but cannot be served; the reason.
        """
        if name in self._broken:
            raise self._broken[name].error
        status = self._status_of(name)
        if status is None:
            raise not_found(name)
        return status

    def chat_template(self, name: str) -> str:
        """The adapter's own chat template; "" where it brings none.

        Raises:
            NotFoundError: there is no such adapter.
            ServerError: it was registered but cannot be served; the reason.
        """
        return self._find(name).manifest.chat_template

    @property
    def tokenizers(self) -> dict[str, TokenizerSource]:
        """The tokenizers that adapters bring, by name."""
        return dict(self._tokenizers)

    def drain_tokenizers(self) -> dict[str, TokenizerSource | None]:
        """Those that came or changed since the last call, None for those that are gone."""
        changed, self._new_tokenizers = self._new_tokenizers, {}
        return changed

    def watch(self, watched: bool) -> None:
        """Has changes kept for `drain_changes`, or kept no longer."""
        self._watched = watched
        self._changed.clear()

    def drain_changes(self) -> AdapterChanges:
        """What has changed since the last call: adapters as they are now, and names that are gone."""
        names, self._changed = sorted(self._changed), set()
        found = {name: self._status_of(name) for name in names}
        return AdapterChanges(
            tuple(status for status in found.values() if status is not None),
            tuple(name for name, status in found.items() if status is None),
        )

    def _status_of(self, name: str) -> AdapterStatus | None:
        record = self._records.get(name)
        if record is None and name in self._inspecting:
            return unread_status(name, self._inspecting[name].source)
        draining = (other for other in self._retired if other.draining and other.name == name)
        record = record or next(draining, None)
        return None if record is None else record.status()

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
            AlreadyExistsError: a name is taken by an adapter from elsewhere; the text names both.
        """
        if not folder.is_dir():
            raise NotFoundError(f"there is no folder {str(folder)!r}", resource=("folder", str(folder)))
        names = []
        for path in sorted(folder.absolute().glob(f"*/{CONFIG_FILE}")):
            name, source = path.parent.name, path.parent
            broken = self._broken.get(name)
            if broken is not None and broken.source != str(source):
                raise taken(name, broken.source, str(source))
            try:
                self.register(name, source)
            except AlreadyExistsError:
                raise
            except ServerError as error:
                _log.warning("%s", error)
                self._broken[name] = Broken(str(source), error, stamp(source))
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
        folder = self._sources.find(source)
        known = self._records.get(name)
        if known is not None and known.manifest.folder == folder:
            return known.status()
        self._check_free(name, str(source))
        return self._admit(name, str(source), self._inspect(name, folder)).status()

    def load(self, name: str, source: str, done: StatusCallback, *, inplace: bool = False) -> None:
        """Registers an adapter and brings it to host memory, in the background; fetches it first if need be.

        `done` is called from `poll` with its status, or with the error for which nothing was registered.

        Args:
            inplace: if the name is taken, the new version replaces the registered one once it is read and
                checked. Of two such loads the later one counts.

        Raises:
            InvalidArgumentError: the name is bad.
            AlreadyExistsError: the name is taken.
            ResourceExhaustedError: too many adapters are being fetched.
        """
        check_name(name)
        shown = redact(source)
        inplace = inplace and name in self._records
        if not inplace:
            self._check_free(name, shown)
        inspection = Inspection(shown, done, inplace=inplace)
        self._look_at(
            name, inspection, lambda: self._sources.resolve(source), slow=self._sources.is_remote(source)
        )

    def compose(
        self, name: str, composition: Composition, done: StatusCallback, *, inplace: bool = False
    ) -> None:
        """Registers what PEFT makes of several adapters as an adapter of its own; `done` as for `load`.

        The result is made of its members as they are now. It does not follow them.

        Raises:
            InvalidArgumentError, AlreadyExistsError, ResourceExhaustedError: as `load`.
            NotFoundError: a member is not there.
            FailedPreconditionError: PEFT defines no combination of a member with others.
        """
        check_name(name)
        inplace = inplace and name in self._records
        if not inplace:
            self._check_free(name, str(composition))
        records = [self._find(use.name) for use in composition.members]
        for record in records:
            check_member(record.manifest)
        members = [Member(record.manifest, record.content_hash) for record in records]

        inspection = Inspection(str(composition), done, inplace=inplace)

        def release() -> None:
            for member in members:
                self._sources.release(member.manifest.folder)

        def make() -> Path:
            try:
                return self._composer.make(composition, members, inspection.unwanted)
            finally:
                release()

        for member in members:
            self._sources.retain(member.manifest.folder)
        try:
            self._look_at(name, inspection, make, slow=True)
        except ServerError:
            release()
            raise

    def adopt(
        self,
        name: str,
        staged: Path,
        sha256: Mapping[str, str],
        done: StatusCallback,
        *,
        inplace: bool = False,
    ) -> None:
        """Registers an adapter whose files a client has sent; `done` as for `load`.

        Args:
            staged: the folder with its files, in the cache's staging folder; they are taken out of it.
            sha256: of each file, by name.

        Raises:
            InvalidArgumentError, AlreadyExistsError: as `load`.
            ResourceExhaustedError: so many are registered or under way that no more are taken.
        """
        check_name(name)
        source = f"{_UPLOAD}{sha256[WEIGHTS_FILE]}"
        inplace = inplace and name in self._records
        if not inplace:
            self._check_free(name, source)
        sources = [record.source for record in self._records.values()]
        sources += [inspection.source for inspection in self._inspecting.values()]
        uploaded = sum(known.startswith(_UPLOAD) for known in sources)
        if uploaded >= self._config.max_uploaded and not inplace:
            raise ResourceExhaustedError(
                f"{uploaded} adapters are registered that clients sent, which is the most "
                "(--max-uploaded-adapters); unload one first",
                resource=("adapters", "uploaded"),
                reason=Reason.TOO_MANY_ADAPTERS,
            )
        key = entry_key("upload", *(f"{file} {digest}" for file, digest in sorted(sha256.items())))
        self._look_at(
            name,
            Inspection(source, done, inplace=inplace),
            lambda: self._sources.land(key, staged, source),
            slow=True,
        )

    def unload(self, name: str, done: Callable[[], None]) -> None:
        """Forgets an adapter: requests no longer find it, those that hold it finish.

        `done` is called when the memory of all its versions is free, at once if nobody holds one. The name
        may be registered anew before that. A pin goes with the adapter; a load under way is cancelled.

        Raises:
            NotFoundError: there is none of this name, and none that drains.
        """
        draining = [record for record in self._retired if record.draining and record.name == name]
        record = self._records.get(name)
        inspection = self._inspecting.pop(name, None)
        if record is not None:
            draining.append(record)
        elif inspection is not None:
            inspection.give_up(unloaded(name))
        elif self._broken.pop(name, None) is None and not draining:
            raise not_found(name)
        left = len(draining)

        def freed() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for version in draining:
            version.on_drained.append(freed)
        self._abandon(name, unloaded(name))
        if record is not None:
            record.draining = True
            self._pins.unpin(record)
            self._answer(record, unloaded(name))
            self._retire(record)
        elif not draining:
            done()

    def pin(self, name: str, pinned: bool, done: StatusCallback) -> None:
        """Keeps an adapter on the device, or lets it go again. `done` is called once it is there, or failed.

        While a pinned adapter waits for room, requests that would need room wait too.

        Raises:
            NotFoundError: there is none of this name.
            FailedPreconditionError: pins would leave too little room for the largest other adapter or for a
                request that is under way.
        """
        record = self._find(name)
        self._touch(name)
        if not pinned:
            self._pins.unpin(record)
            callbacks, record.on_pinned = record.on_pinned, []
            self._settle(record)
            for callback in callbacks:
                callback(CancelledError(f"adapter {name!r} was unpinned", resource=("adapter", name)))
            done(record.status())
            return
        if not record.pinned:
            self._check_pin(record)
            self._pins.pin(record)
        if record.resident:
            done(record.status())
            return
        record.on_pinned.append(done)
        self._bring_pinned()

    def prefetch(self, names: Iterable[str], *, to_device: bool = True) -> builtins.list[AdapterStatus]:
        """A hint that these adapters will be wanted: they are brought in as far as there is room.

        Whatever a request asks for goes first. Room is taken from adapters that no request holds, that are
        not pinned, and that this hint does not name; for what finds none, nothing is done.

        Returns:
            The adapters as they are now.

        Raises:
            NotFoundError: there is none of a name; then nothing is brought in.
            ServerError: it was registered but cannot be served; the reason.
        """
        records = [self._find(name) for name in dict.fromkeys(names)]
        for record in records:
            if not record.resident:
                self._popularity.used(record)
        self._loading.hint(records, to_device=to_device)
        self._loading.run(may_place=not self._pins.waiting)
        return [record.status() for record in records]

    # Requests

    def resolve(
        self, names: Sequence[str], weights: Sequence[float] | None = None
    ) -> tuple[AdapterHandle, ...]:
        """A registry reference to each adapter, for one request; what is on disk is read ahead from now on.

        Args:
            weights: one for each name; 1 where left out.

        Raises:
            InvalidArgumentError: there are more names than a request may have.
            NotFoundError: there is no such adapter.
            FailedPreconditionError: they can never be on the device together, one cannot be served, or one
                that does more than add to the base is weighted or not alone.
        """
        limit = self._config.max_per_request
        if len(names) > limit:
            raise InvalidArgumentError.field("adapters", f"{len(names)} are named; at most {limit} may be")
        records = tuple(self._find(name) for name in names)
        _check_composition(records, weights or [1.0] * len(names))
        self._pins.check_fits(records, "the adapters of this request", "the request")
        handles = tuple(AdapterHandle(record, records) for record in records)
        for handle in handles:
            handle.record.references += 1
            self._handles.add(handle)
            self._popularity.used(handle.record)
        self._loading.prefetch(record for record in records if record.slot is None)
        return handles

    def release(self, handles: Iterable[AdapterHandle]) -> None:
        """Ends references, device references that are still held included. Each handle is released once."""
        handles = tuple(handles)
        self.unreserve(handles)
        for handle in handles:
            if handle not in self._handles:
                raise InternalError(f"{handle} was released twice")
            self._handles.remove(handle)
            record = handle.record
            record.references -= 1
            if not record.references:
                self._loading.not_expected(record)
            self._settle(record)

    def reserve(self, handles: Sequence[AdapterHandle]) -> Readiness:
        """Asks for all adapters of a request on the device; never waits, and takes all or nothing.

        READY and LOADING hold a device reference to each until `unreserve`; BLOCKED and FAILED hold nothing.
        BLOCKED still has what is missing read into host memory, as far as there is room.
        """
        if any(handle.reserved for handle in handles):
            raise InternalError("an adapter is reserved already")
        self._count(handles)
        records = list(dict.fromkeys(handle.record for handle in handles))
        if any(record.error for record in records):
            return Readiness.FAILED
        missing = [record for record in records if record.slot is None]
        if missing and (self._pins.waiting or not self._device.place(missing, keep=records)):
            self._loading.prefetch(missing)
            return Readiness.BLOCKED
        for handle in handles:
            handle.reserved = True
            handle.record.device_references += 1
        for record in records:
            record.hint = 0
        for record in missing:
            self._loading.fetch(record)
        return self.is_ready(handles)

    def is_ready(self, handles: Sequence[AdapterHandle]) -> Readiness:
        """READY, LOADING or FAILED, for handles that are reserved. FAILED keeps the references, too."""
        if not all(handle.reserved for handle in handles):
            raise InternalError("an adapter is not reserved")
        if any(handle.record.error for handle in handles):
            return Readiness.FAILED
        return Readiness.READY if all(handle.record.resident for handle in handles) else Readiness.LOADING

    def unreserve(self, handles: Iterable[AdapterHandle]) -> None:
        """Gives device references back; handles without one are left alone."""
        for handle in handles:
            if handle.reserved:
                handle.reserved = False
                handle.record.device_references -= 1
                self._settle(handle.record)

    def device_references(self, name: str) -> int:
        """Device references of all requests to the adapter of this name, all its versions together."""
        versions = [record for record in self._retired if record.name == name]
        if name in self._records:
            versions.append(self._records[name])
        return sum(record.device_references for record in versions)

    def failure(self, handles: Iterable[AdapterHandle]) -> ServerError | None:
        """Why a request cannot have its adapters."""
        return next((handle.record.error for handle in handles if handle.record.error), None)

    def slot(self, handle: AdapterHandle) -> int:
        """The pool's slot of an adapter that is reserved and READY; the same until it is unreserved."""
        slot = handle.record.slot
        if slot is None or not handle.reserved or not handle.record.resident:
            raise InternalError(f"{handle} is not on the device")
        return slot

    # The engine's loop

    def poll(self) -> bool:
        """Takes up what the workers finished and gives them more to do. Call it between steps; never waits.

        Returns:
            Whether anything had finished.
        """
        self._event.clear()
        finished = len(self._posted)
        for _ in range(finished):
            self._posted.popleft()()
        self._bring_pinned()
        self._loading.run(may_place=not self._pins.waiting)
        return finished > 0

    def wait_event(self, timeout_s: float | None = None) -> bool:
        """Waits until a worker has finished something, for an engine that is idle."""
        return self._event.wait(timeout_s)

    def close(self) -> None:
        """Stops the workers, after what they are at, and answers whoever still waits with UNAVAILABLE."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        self._loading.close()
        self._sources.close()
        self._composer.close()
        self._fetchers.close(_STOP_FETCHES_S)
        error = UnavailableError("the engine stops")
        for inspection in [*self._inspecting.values(), *self._replacing.values()]:
            inspection.give_up(error)
        self._inspecting.clear()
        self._replacing.clear()
        for record in self._all():
            self._answer(record, error)

    def check_integrity(self) -> builtins.list[str]:
        """One line for each broken invariant of slots, bytes, tables and references."""
        records = self._all()
        problems = self._device.check_integrity(records) + self._host.check_integrity(records)
        references = collections.Counter(handle.record for handle in self._handles)
        reserved = collections.Counter(handle.record for handle in self._handles if handle.reserved)
        for record in records:
            label = f"adapter {record.name!r}"
            counted, held = (
                (record.references, record.device_references),
                (references[record], reserved[record]),
            )
            if counted != held:
                problems.append(f"{label}: counts {counted} references, {held} are held")
            if record.pinned != (record in self._pins.records):
                problems.append(f"{label}: its pin is not listed")
            if record.copying and (record.slot is None or record.blob is None or record.resident):
                problems.append(f"{label}: copied without a slot or a host copy")
            if record.slot is not None and not (record.resident or record.copying or record.wanted_on_device):
                problems.append(f"{label}: has room on the device that nobody wants")
            if record.retired and not (record.references or record.busy):
                problems.append(f"{label}: unused, but not freed")
        return problems

    # What comes to and goes from watched folders

    def _report(self, change: Change) -> None:
        """Called by the watch's thread."""
        self._post(lambda: self._follow(change))

    def _follow(self, change: Change) -> None:
        name, source = change.folder.name, str(change.folder)
        known = self._records.get(name)
        broken = self._broken.get(name)
        ours = source in (known.source if known else None, broken.source if broken else None)
        if change.kind is ChangeKind.REMOVED:
            if ours:
                _log.info("adapter %r is unloaded: %s is gone", name, source)
                self.unload(name, lambda: None)
        elif known is not None and ours:
            # One that is not in memory cannot be served from its old files any more: its next read tells.
            read = known.blob is not None or known.slot is not None or known.reading
            self._look_at_folder(name, source, Inspection(source, log_outcome, read=read, inplace=True))
        elif change.kind is ChangeKind.ADDED or broken is not None:
            try:
                check_name(name)
                self._check_free(name, source)
                self._look_at_folder(name, source, Inspection(source, log_outcome, read=False))
            except ServerError as error:
                _log.warning("%s is not registered: %s", source, error)

    # Making and ending versions

    def _look_at_folder(self, name: str, source: str, inspection: Inspection) -> None:
        self._look_at(name, inspection, lambda: self._sources.resolve(source), slow=False)

    def _look_at(self, name: str, inspection: Inspection, find: Callable[[], Path], *, slow: bool) -> None:
        """Has a folder found and inspected, by the reader, or on a thread of its own if that may be slow."""

        def inspect() -> AdapterManifest:
            folder = find()
            try:
                return self._inspect(name, folder)
            except BaseException:
                self._sources.release(folder)
                raise

        worker = self._fetchers if slow else self._loading.reader
        worker.submit(inspect, lambda outcome: self._was_inspected(name, inspection, outcome))
        self._abandon(name, superseded(name))
        (self._replacing if inspection.inplace else self._inspecting)[name] = inspection
        self._touch(name)

    def _inspect(self, name: str, folder: Path) -> AdapterManifest:
        roots = self._sources.roots
        return read_manifest(name, folder, self._registry, roots, self._max_rank, self._kinds, self._base)

    def _was_inspected(self, name: str, inspection: Inspection, outcome: Outcome[AdapterManifest]) -> None:
        manifest = outcome.result
        waiting = self._replacing if inspection.inplace else self._inspecting
        try:
            if waiting.get(name) is not inspection:
                return
            del waiting[name]
            self._touch(name)
            if manifest is None:
                raise outcome.error or InternalError("nothing was read")
            # What it was to replace may have failed meanwhile.
            candidate = inspection.inplace and name in self._records
            record = self._admit(name, inspection.source, manifest, candidate=candidate)
        except ServerError as error:
            if not inspection.read and not inspection.inplace:
                self._broken[name] = Broken(inspection.source, error, stamp(Path(inspection.source)))
            inspection.done(error)
        else:
            if inspection.read:
                record.on_loaded = inspection.done
                self._loading.demand(record)
            else:
                if candidate:
                    self._swap(record)
                inspection.done(record.status())
        finally:
            # From here on the record holds it, or nobody.
            if manifest is not None:
                self._sources.release(manifest.folder)

    def _admit(self, name: str, source: str, manifest: AdapterManifest, *, candidate: bool = False) -> Record:
        """Registers a checked adapter that fits both budgets, or makes it the candidate for a swap."""
        itemsize = self._dtype.itemsize
        layout = self._layout(manifest)
        units, host_bytes = self._device.padded(layout.num_elements), layout.num_elements * itemsize
        for option, needed, budget in (
            ("--adapter-device-bytes", units * itemsize, self._device.capacity_units * itemsize),
            ("--adapter-host-bytes", host_bytes, self._host.capacity_bytes),
        ):
            if needed > budget:
                raise refusal(name, f"it takes {needed} bytes of {budget}; give the server more {option}")
            if 0 < self._config.max_bytes < needed:
                raise refusal(
                    name,
                    f"it takes {needed} bytes, and one adapter may take {self._config.max_bytes} "
                    "(--adapter-max-bytes)",
                )
        self._sources.retain(manifest.folder)
        record = Record(name, source, manifest, layout, units, host_bytes)
        if candidate:
            self._candidates[name] = record
        else:
            self._broken.pop(name, None)
            self._records[name] = record
            self._note_tokenizer(name)
            self._touch(name)
        return record

    def _swap(self, new: Record) -> None:
        """Puts a candidate in the place of the version that is registered, which drains."""
        name = new.name
        del self._candidates[name]
        old = self._records.get(name)
        self._broken.pop(name, None)
        self._records[name] = new
        self._note_tokenizer(name)
        if old is None:
            return
        wanted = old.slot is not None
        new.popularity = max(new.popularity, old.popularity)
        new.on_pinned, old.on_pinned = old.on_pinned, []
        old.draining = True
        self._pins.pass_on(old, new)
        self._answer(old, superseded(name))
        self._retire(old)
        self._bring_pinned()
        if wanted:
            self._loading.hint([new], to_device=True)
        _log.info("adapter %r is served in a new version from %s", name, new.source)

    def _abandon(self, name: str, error: ServerError) -> None:
        """Gives up what was to replace the adapter of this name."""
        inspection = self._replacing.pop(name, None)
        if inspection is not None:
            inspection.give_up(error)
        candidate = self._candidates.get(name)
        if candidate is not None:
            self._answer(candidate, error)
            self._retire(candidate)

    def _all(self) -> builtins.list[Record]:
        """Every version that may hold memory."""
        return [*self._records.values(), *self._candidates.values(), *self._retired]

    def _layout(self, manifest: AdapterManifest) -> AdapterLayout:
        """Adapters of one kind share one."""
        layout = None if manifest.kind is None else self._layouts.get(manifest.kind)
        if layout is None:
            layout = lay_out(manifest, self._device.alignment, scaled=self._device.pool.scaled)
            if manifest.kind is not None:
                self._layouts[manifest.kind] = layout
        return layout

    def _check_free(self, name: str, source: str) -> None:
        if name in self._records:
            raise taken(name, self._records[name].source, source)
        if name in self._inspecting:
            raise taken(name, self._inspecting[name].source, source)

    def _find(self, name: str) -> Record:
        record = self._records.get(name)
        if record is not None:
            return record
        broken = self._broken.get(name)
        if broken is None:
            raise not_found(name)
        if not broken.may_have_healed():
            raise broken.error
        try:
            self.register(name, broken.source)
        except ServerError as error:
            self._broken[name] = Broken(broken.source, error, stamp(Path(broken.source)))
            raise
        return self._records[name]

    def _retire(self, record: Record) -> None:
        """Takes a version out of the registry; it is freed when nobody holds it."""
        for registered in (self._records, self._candidates):
            if registered.get(record.name) is record:
                del registered[record.name]
        self._retired.add(record)
        record.retired = True
        self._note_tokenizer(record.name)
        self._touch(record.name)
        self._loading.retired(record)
        self._settle(record)

    def _fail(self, record: Record, error: ServerError) -> None:
        """Ends a version: all who hold it get `error`, the next request may try the files again."""
        if record.retired:
            error = UnavailableError(
                f"adapter {record.name!r} was replaced or unloaded while this request waited for it, and its "
                "old version is gone; send the request again",
                resource=("adapter", record.name),
            )
        record.error = error
        self._pins.unpin(record)
        if record.on_loaded is None and not record.retired:
            folder = record.manifest.folder
            self._broken[record.name] = Broken(str(folder), error, stamp(folder))
        self._answer(record, error)
        self._retire(record)

    def _settle(self, record: Record) -> None:
        """Frees what nobody needs any more, after a reference or a worker has let go of it."""
        unfilled = record.slot is not None and not record.resident and not record.copying
        if unfilled and not record.wanted_on_device:
            self._device.vacate(record)
            self._loading.not_demanded(record)
        if record.retired and not record.references and not record.busy:
            if record.slot is not None:
                self._device.vacate(record)
            if record.blob is not None:
                self._host.drop(record)
            self._sources.release(record.manifest.folder)
            self._retired.discard(record)
            self._touch(record.name)
            callbacks, record.on_drained = record.on_drained, []
            for callback in callbacks:
                callback()

    def _answer(self, record: Record, answer: AdapterStatus | ServerError) -> None:
        """Calls back whoever loads or pins `record`."""
        callbacks = [*record.on_pinned, *([record.on_loaded] if record.on_loaded else [])]
        record.on_pinned, record.on_loaded = [], None
        for callback in callbacks:
            callback(answer)

    # Room

    def _check_pin(self, record: Record) -> None:
        self._pins.check(record, self._records.values(), {handle.group for handle in self._handles})

    def _bring_pinned(self) -> None:
        """Pins what may be pinned by now, and brings in those pinned that there is room for."""
        for record in self._pins.settle(
            lambda record: self._records.get(record.name) is record, self._check_pin
        ):
            self._touch(record.name)
        self._pins.place(self._loading.fetch)

    # Disk to host, host to device

    def _read(self, record: Record) -> HostBlob:
        """On the reader's thread."""
        return read_weights(
            record.manifest,
            record.layout,
            self._dtype,
            self._sources.roots,
            self._base,
            pin_memory=self._pin_memory,
        )

    def _was_read(self, record: Record, outcome: Outcome[HostBlob]) -> None:
        blob, error = outcome.result, outcome.error
        if blob is not None and record.content_hash not in ("", blob.content_hash):
            error = refusal(record.name, "its weights were changed on disk; unload it and load it anew")
        if blob is None or error is not None:
            self._host.abandon(record)
            self._fail(record, error or InternalError("nothing was read"))
            return
        record.content_hash = blob.content_hash
        self._host.arrived(record, blob)
        self._note("load", record, outcome.seconds)
        if self._candidates.get(record.name) is record and not self._replace(record):
            return
        if record.on_loaded is not None:
            self._popularity.used(record)
            callback, record.on_loaded = record.on_loaded, None
            callback(record.status())
        if record.slot is not None and not record.copying:
            self._loading.copy(record, blob)
        self._settle(record)

    def _replace(self, candidate: Record) -> bool:
        """Swaps a candidate that is read in, unless it is what is served already; whether it was."""
        old = self._records.get(candidate.name)
        if old is None or old.origin != candidate.origin:
            self._swap(candidate)
            return True
        self._answer(candidate, old.status())
        self._retire(candidate)
        return False

    def _was_copied(self, record: Record, outcome: Outcome[None]) -> None:
        record.copying = False
        if outcome.error is not None:
            self._fail(record, outcome.error)
            return
        self._device.arrived(record)
        self._note("copy", record, outcome.seconds)
        callbacks, record.on_pinned = record.on_pinned, []
        for callback in callbacks:
            callback(record.status())
        self._settle(record)

    # Small things

    def _post(self, call: Callable[[], None]) -> None:
        self._posted.append(call)
        self._event.set()
        if self._wake is not None:
            self._wake()

    def _touch(self, name: str) -> None:
        if self._watched:
            self._changed.add(name)

    def _note_tokenizer(self, name: str) -> None:
        """Takes up which tokenizer the adapter of this name brings now."""
        record = self._records.get(name)
        found = None if record is None else record.manifest.tokenizer
        if record is not None and found is not None:
            found = msgspec.structs.replace(found, added_tokens=record.manifest.added_tokens)
        if found == self._tokenizers.get(name):
            return
        self._new_tokenizers[name] = found
        if found is None:
            del self._tokenizers[name]
        else:
            self._tokenizers[name] = found

    def _note(self, kind: str, record: Record, seconds: float = 0.0) -> None:
        self._touch(record.name)
        self._swaps.append(SwapRecord(kind, record.name, seconds, record.host_bytes))

    def _count(self, handles: Iterable[AdapterHandle]) -> None:
        for handle in handles:
            if not handle.counted:
                handle.counted = True
                hit = handle.record.resident
                handle.record.hits += hit
                handle.record.misses += not hit
                self._hits += hit
                self._misses += not hit


def _check_composition(records: Sequence[Record], weights: Sequence[float]) -> None:
    alone = len(records) == 1 and weights[0] == 1
    for record in records:
        if not alone and not record.manifest.linear:
            raise FailedPreconditionError(
                f"adapter {record.name!r} does more than add to what the base computes "
                f"({record.manifest.peft_type}): neither a weight nor a sum with others is defined for it; "
                "name it alone, at weight 1",
                resource=("adapter", record.name),
                reason=Reason.ADAPTERS_NOT_ADDABLE,
            )
