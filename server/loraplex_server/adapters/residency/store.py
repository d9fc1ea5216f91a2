"""The adapter cache: which adapters there are, where each one lies, and who uses it.

    disk ──read──▶ host memory ──copy──▶ device arena
    UNLOADED  LOADING   HOST      COPYING    DEVICE

Everything here runs on one thread, the engine's: reading and copying happen on two workers, whose outcomes
`poll` takes up between steps. So a step sees an adapter whole or not at all, and nothing needs a lock.

Both tiers evict by bytes, the least asked for first, where recent requests count most. A host copy may go
while the device copy stays. Two names with the same content are two adapters, each with a slot of its own.

A version of an adapter never changes. Reading weights again that differ from those first read is an error,
since what was computed with the old ones may still be in use. A new version takes the place of the old one in
one step (`Intake.load` in place): it is read and checked beside it, requests that hold the old one finish on
it, and if anything is wrong with the new one, the old one stays.

- `intake`    the way in: folders, sources, uploads, compositions
- `registry`  what each name means
- `versions`  the life of a version, from admission until it is freed
- `requests`  what requests hold
- `device_tier`, `host_tier`, `loading`, `pins`, `popularity`: who has room where, and who comes next
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable

import torch

from loraplex_kernels.pool import MAX_RANK
from loraplex_server.adapters.origins.resolver import AdapterSources, Resolver
from loraplex_server.adapters.origins.watch import Change, FolderWatch
from loraplex_server.adapters.residency.activity import Activity
from loraplex_server.adapters.residency.device_tier import DeviceTier
from loraplex_server.adapters.residency.inspection import not_found, unloaded
from loraplex_server.adapters.residency.intake import Intake
from loraplex_server.adapters.residency.record import Record, StatusCallback
from loraplex_server.adapters.residency.registry import Registry
from loraplex_server.adapters.residency.requests import Requests
from loraplex_server.adapters.residency.versions import Versions
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import CancelledError, UnavailableError
from loraplex_server.core.frozen_base import FrozenBase


class AdapterStore:
    """All adapters of one engine. Every method, also of its parts, belongs to the engine's thread.

    Attributes:
        pool: the device memory that the kernels read; the same object for the store's lifetime.
        registry: what each name means, and what has changed.
        intake: brings adapters in.
        requests: what requests hold.
        activity: counts of movements, hits and misses.

    Args:
        sites: of the base model.
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
        sites: SiteRegistry,
        config: AdapterConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        base: FrozenBase | None = None,
        max_rank: int = MAX_RANK,
        wake: Callable[[], None] | None = None,
        sources: Resolver | None = None,
    ) -> None:
        self._wake = wake
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._event = threading.Event()
        self._closed = False
        self._device = DeviceTier(
            sites,
            capacity_bytes=config.device_bytes,
            max_adapters=config.max_on_device,
            device=torch.device(device),
            dtype=dtype,
            max_rank=max_rank,
            scaled=config.device_dtype == "int8",
            evicted=lambda record: self._versions.evicted_from_device(record),
        )
        self.pool = self._device.pool
        self.registry = Registry()
        self.activity = Activity()
        self._sources: Resolver = sources or AdapterSources(config)
        self._versions = Versions(
            self.registry, self._device, self.activity, self._sources, config, base, self._post
        )
        self.intake = Intake(
            self.registry,
            self._versions,
            self._sources,
            sites,
            max_rank=max_rank,
            max_uploaded=config.max_uploaded,
            base=base,
            post=self._post,
        )
        self.requests = Requests(self.registry, self._versions, self._device, self.activity, self.intake.find)
        self._pins, self._loading = self._versions.pins, self._versions.loading
        self._watch: FolderWatch | None = None
        if config.watch_s:
            self._watch = FolderWatch(config.folders, config.watch_s, self._report)

    # What there is

    @property
    def num_slots(self) -> int:
        """Most adapters on the device at once."""
        return self._device.num_slots

    @property
    def device_bytes_used(self) -> int:
        """Bytes of the arena in use, room set aside included."""
        return self._device.used_units * self.pool.arena.dtype.itemsize

    @property
    def host_bytes_used(self) -> int:
        """Bytes of host copies, those being read included."""
        return self._versions.host.used_bytes

    @property
    def on_device(self) -> tuple[str, ...]:
        """Names of the adapters that can run now, the least asked for first."""
        return tuple(record.name for record in self._device.records if record.resident)

    @property
    def on_host(self) -> tuple[str, ...]:
        """Names of the adapters with a host copy."""
        return tuple(record.name for record in self._versions.host.records)

    @property
    def busy(self) -> bool:
        """True if a worker is at something, so that a `poll` will be due."""
        return self.intake.busy or self._loading.busy

    def chat_template(self, name: str) -> str:
        """The adapter's own chat template; "" where it brings none.

        Raises:
            NotFoundError: there is no such adapter.
            ServerError: it was registered but cannot be served; the reason.
        """
        return self.intake.find(name).manifest.chat_template

    # What is asked for

    def unload(self, name: str, done: Callable[[], None]) -> None:
        """Forgets an adapter: requests no longer find it, those that hold it finish.

        `done` is called when the memory of all its versions is free, at once if nobody holds one. The name
        may be registered anew before that. A pin goes with the adapter; a load under way is cancelled.

        Raises:
            NotFoundError: there is none of this name, and none that drains.
        """
        registry = self.registry
        draining = registry.draining(name)
        record = registry.served.get(name)
        inspection = registry.arriving.pop(name, None)
        if record is not None:
            draining.append(record)
        elif inspection is not None:
            inspection.give_up(unloaded(name))
        elif registry.broken.pop(name, None) is None and not draining:
            raise not_found(name)
        left = len(draining)

        def freed() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for version in draining:
            version.on_drained.append(freed)
        self._versions.abandon(name, unloaded(name))
        if record is not None:
            self._versions.drain(record, unloaded(name))
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
        record = self.intake.find(name)
        self.registry.changes.touch(name)
        if not pinned:
            self._pins.unpin(record)
            callbacks, record.on_pinned = record.on_pinned, []
            self._versions.settle(record)
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

    def prefetch(self, names: Iterable[str], *, to_device: bool = True) -> list[AdapterStatus]:
        """A hint that these adapters will be wanted: they are brought in as far as there is room.

        Whatever a request asks for goes first. Room is taken from adapters that no request holds, that are
        not pinned, and that this hint does not name; for what finds none, nothing is done.

        Returns:
            The adapters as they are now.

        Raises:
            NotFoundError: there is none of a name; then nothing is brought in.
            ServerError: it was registered but cannot be served; the reason.
        """
        records = [self.intake.find(name) for name in dict.fromkeys(names)]
        for record in records:
            if not record.resident:
                self._versions.popularity.used(record)
        self._loading.hint(records, to_device=to_device)
        self._loading.run(may_place=not self._pins.waiting)
        return [record.status() for record in records]

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
        self.intake.close()
        error = UnavailableError("the engine stops")
        self.intake.give_up(error)
        for record in self.registry.versions():
            self._versions.answer(record, error)

    def check_integrity(self) -> list[str]:
        """One line for each broken invariant of slots, bytes, tables and references."""
        records = self.registry.versions()
        problems = self._device.check_integrity(records) + self._versions.host.check_integrity(records)
        problems += self.requests.check_integrity(records)
        for record in records:
            label = f"adapter {record.name!r}"
            if record.pinned != (record in self._pins.records):
                problems.append(f"{label}: its pin is not listed")
            if record.copying and (record.slot is None or record.blob is None or record.resident):
                problems.append(f"{label}: copied without a slot or a host copy")
            if record.slot is not None and not (record.resident or record.copying or record.wanted_on_device):
                problems.append(f"{label}: has room on the device that nobody wants")
            if record.retired and not (record.references or record.busy):
                problems.append(f"{label}: unused, but not freed")
        return problems

    def _check_pin(self, record: Record) -> None:
        self._pins.check(record, self.registry.served.values(), self.requests.groups())

    def _bring_pinned(self) -> None:
        """Pins what may be pinned by now, and brings in those pinned that there is room for."""
        for record in self._pins.settle(self.registry.is_served, self._check_pin):
            self.registry.changes.touch(record.name)
        self._pins.place(self._loading.fetch)

    def _report(self, change: Change) -> None:
        """Called by the watch's thread."""
        self._post(lambda: self.intake.follow(change, lambda name: self.unload(name, lambda: None)))

    def _post(self, call: Callable[[], None]) -> None:
        """Called by workers."""
        self._posted.append(call)
        self._event.set()
        if self._wake is not None:
            self._wake()
