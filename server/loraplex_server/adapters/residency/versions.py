"""The life of a version of an adapter: admitted, read, copied, swapped in for another, retired, freed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from loraplex_kernels.pool import AdapterLayout
from loraplex_server.adapters.files.folder import stamp
from loraplex_server.adapters.files.weights import HostBlob, lay_out, read_weights
from loraplex_server.adapters.origins.resolver import Resolver
from loraplex_server.adapters.residency.activity import Activity
from loraplex_server.adapters.residency.device_tier import DeviceTier
from loraplex_server.adapters.residency.host_tier import HostTier
from loraplex_server.adapters.residency.inspection import Broken, superseded
from loraplex_server.adapters.residency.loading import Loading
from loraplex_server.adapters.residency.pins import Pins
from loraplex_server.adapters.residency.popularity import Popularity
from loraplex_server.adapters.residency.record import Record
from loraplex_server.adapters.residency.registry import Registry
from loraplex_server.adapters.residency.workers import Outcome
from loraplex_server.adapters.spec.manifest import AdapterManifest, Kind
from loraplex_server.adapters.spec.refusals import refusal
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import InternalError, ServerError, UnavailableError
from loraplex_server.core.frozen_base import FrozenBase

_log = logging.getLogger(__name__)

_HALF_LIFE = 16
"""Uses a slot after which one counts half. With 32 slots and 5,000 adapters asked for by Zipf's law, 42.9% of
requests hit (64: 43.6%, least recently used: 29.0%). Where the favourites change, 41.8% do (4: 39.2%, 64:
40.1%). `tests/adapters/test_popularity` has the traffic."""


class Versions:
    """All versions of all adapters, and the memory of the host and of the device that they take.

    Attributes:
        loading: what is to be read and copied.
        pins: which of them stay on the device.
        popularity: how much each is asked for.

    Args:
        sources: whose folders are held while a version may be read from them.
        base: the base model's weights, for the methods that are relative to them (DoRA).
        post: takes calls from the workers, for the engine's thread.
    """

    def __init__(
        self,
        registry: Registry,
        device: DeviceTier,
        activity: Activity,
        sources: Resolver,
        config: AdapterConfig,
        base: FrozenBase | None,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._registry = registry
        self._device = device
        self._activity = activity
        self._sources = sources
        self._base = base
        self._max_bytes = config.max_bytes
        self._dtype = device.pool.arena.dtype
        self._pin_memory = device.pool.arena.device.type == "cuda"
        self._layouts: weakref.WeakKeyDictionary[Kind, AdapterLayout] = weakref.WeakKeyDictionary()
        self.host = HostTier(config.host_bytes, lambda record: self._moved("evict_host", record))
        self.popularity = Popularity(_HALF_LIFE * device.num_slots)
        self.pins = Pins(device, config.max_pinned, self._dtype.itemsize)
        self.loading = Loading(
            self.host,
            device,
            read=self._read,
            was_read=self._was_read,
            was_copied=self._was_copied,
            post=post,
        )

    def admit(self, name: str, source: str, manifest: AdapterManifest, *, candidate: bool = False) -> Record:
        """Registers a checked adapter that fits both budgets, or makes it the candidate for a swap.

        Raises:
            FailedPreconditionError: it can never fit.
            NotFoundError: its downloaded copy is gone.
        """
        itemsize = self._dtype.itemsize
        layout = self._layout(manifest)
        units, host_bytes = self._device.padded(layout.num_elements), layout.num_elements * itemsize
        for option, needed, budget in (
            ("--adapter-device-bytes", units * itemsize, self._device.capacity_units * itemsize),
            ("--adapter-host-bytes", host_bytes, self.host.capacity_bytes),
        ):
            if needed > budget:
                raise refusal(name, f"it takes {needed} bytes of {budget}; give the server more {option}")
            if 0 < self._max_bytes < needed:
                raise refusal(
                    name,
                    f"it takes {needed} bytes, and one adapter may take {self._max_bytes} "
                    "(--adapter-max-bytes)",
                )
        self._sources.retain(manifest.folder)
        record = Record(name, source, manifest, layout, units, host_bytes)
        if candidate:
            self._registry.candidates[name] = record
        else:
            self._registry.serve(record)
            self._registry.changes.touch(name)
        return record

    def swap(self, new: Record) -> None:
        """Puts a candidate in the place of the version that is served, which drains.

        The pin of the old one, where it has one, is the new one's once there is room for it.
        """
        name = new.name
        del self._registry.candidates[name]
        old = self._registry.serve(new)
        if old is None:
            return
        wanted = old.slot is not None
        new.popularity = max(new.popularity, old.popularity)
        new.on_pinned, old.on_pinned = old.on_pinned, []
        old.draining = True
        self.pins.pass_on(old, new)
        self.answer(old, superseded(name))
        self._retire(old)
        if wanted:
            self.loading.hint([new], to_device=True)
        _log.info("adapter %r is served in a new version from %s", name, new.source)

    def abandon(self, name: str, error: ServerError) -> None:
        """Gives up what was to replace the adapter of this name; who waits for it gets `error`."""
        inspection = self._registry.replacing.pop(name, None)
        if inspection is not None:
            inspection.give_up(error)
        candidate = self._registry.candidates.get(name)
        if candidate is not None:
            self.answer(candidate, error)
            self._retire(candidate)

    def drain(self, record: Record, error: ServerError) -> None:
        """Takes a version away from new requests; who loads or pins it gets `error`."""
        record.draining = True
        self.pins.unpin(record)
        self.answer(record, error)
        self._retire(record)

    def settle(self, record: Record) -> None:
        """Frees what nobody needs any more, after a reference or a worker has let go of it."""
        unfilled = record.slot is not None and not record.resident and not record.copying
        if unfilled and not record.wanted_on_device:
            self._device.vacate(record)
            self.loading.not_demanded(record)
        if record.retired and not record.references and not record.busy:
            if record.slot is not None:
                self._device.vacate(record)
            if record.blob is not None:
                self.host.drop(record)
            self._sources.release(record.manifest.folder)
            self._registry.retired.discard(record)
            self._registry.changes.touch(record.name)
            callbacks, record.on_drained = record.on_drained, []
            for callback in callbacks:
                callback()

    def answer(self, record: Record, answer: AdapterStatus | ServerError) -> None:
        """Calls back whoever loads or pins `record`."""
        callbacks = [*record.on_pinned, *([record.on_loaded] if record.on_loaded else [])]
        record.on_pinned, record.on_loaded = [], None
        for callback in callbacks:
            callback(answer)

    def evicted_from_device(self, record: Record) -> None:
        """Takes note that a version has left the device because another needed the room."""
        self._moved("evict_device", record)

    def _layout(self, manifest: AdapterManifest) -> AdapterLayout:
        """Adapters of one kind share one."""
        layout = None if manifest.kind is None else self._layouts.get(manifest.kind)
        if layout is None:
            layout = lay_out(manifest, self._device.alignment, scaled=self._device.pool.scaled)
            if manifest.kind is not None:
                self._layouts[manifest.kind] = layout
        return layout

    def _retire(self, record: Record) -> None:
        """Takes a version out of the registry; it is freed when nobody holds it."""
        self._registry.retire(record)
        self.loading.retired(record)
        self.settle(record)

    def _fail(self, record: Record, error: ServerError) -> None:
        """Ends a version: all who hold it get `error`, the next request may try the files again."""
        if record.retired:
            error = UnavailableError(
                f"adapter {record.name!r} was replaced or unloaded while this request waited for it, and its "
                "old version is gone; send the request again",
                resource=("adapter", record.name),
            )
        record.error = error
        self.pins.unpin(record)
        if record.on_loaded is None and not record.retired:
            folder = record.manifest.folder
            self._registry.broken[record.name] = Broken(str(folder), error, stamp(folder))
        self.answer(record, error)
        self._retire(record)

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
            self.host.abandon(record)
            self._fail(record, error or InternalError("nothing was read"))
            return
        record.content_hash = blob.content_hash
        self.host.arrived(record, blob)
        self._moved("load", record, outcome.seconds)
        if self._registry.candidates.get(record.name) is record and not self._replace(record):
            return
        if record.on_loaded is not None:
            self.popularity.used(record)
            callback, record.on_loaded = record.on_loaded, None
            callback(record.status())
        if record.slot is not None and not record.copying:
            self.loading.copy(record, blob)
        self.settle(record)

    def _replace(self, candidate: Record) -> bool:
        """Swaps a candidate that is read in, unless it is what is served already; whether it was."""
        old = self._registry.served.get(candidate.name)
        if old is None or old.origin != candidate.origin:
            self.swap(candidate)
            return True
        self.answer(candidate, old.status())
        self._retire(candidate)
        return False

    def _was_copied(self, record: Record, outcome: Outcome[None]) -> None:
        record.copying = False
        if outcome.error is not None:
            self._fail(record, outcome.error)
            return
        self._device.arrived(record)
        self._moved("copy", record, outcome.seconds)
        callbacks, record.on_pinned = record.on_pinned, []
        for callback in callbacks:
            callback(record.status())
        self.settle(record)

    def _moved(self, kind: str, record: Record, seconds: float = 0.0) -> None:
        self._registry.changes.touch(record.name)
        self._activity.moved(kind, record, seconds)
