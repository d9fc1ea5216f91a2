"""The way in: adapters are found, fetched or made, looked at, and admitted to the registry."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from loraplex_server.adapters.files.folder import stamp
from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.origins.composition import Composer, Member, check_member
from loraplex_server.adapters.origins.remote.cache import entry_key
from loraplex_server.adapters.origins.resolver import Resolver
from loraplex_server.adapters.origins.watch import Change, ChangeKind
from loraplex_server.adapters.residency.inspection import (
    Broken,
    Inspection,
    log_outcome,
    not_found,
    superseded,
    taken,
)
from loraplex_server.adapters.residency.record import Record, StatusCallback
from loraplex_server.adapters.residency.registry import Registry
from loraplex_server.adapters.residency.versions import Versions
from loraplex_server.adapters.residency.workers import Outcome, WorkerPool
from loraplex_server.adapters.spec.manifest import AdapterManifest, Kind
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.composition import Composition
from loraplex_server.core.errors import (
    AlreadyExistsError,
    InternalError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    ServerError,
)
from loraplex_server.core.frozen_base import FrozenBase
from loraplex_server.core.names import check_name
from loraplex_server.core.source_uri import redact

_log = logging.getLogger(__name__)

_MAX_FETCHES = 64
"""Loads from elsewhere at once, those included that wait for their turn: a thread each, mostly asleep."""

_STOP_FETCHES_S = 2.0
"""Longest that closing waits for fetches, which look every 0.2 s whether they are to end."""

_UPLOAD = "upload#sha256="
"""The beginning of the source of an adapter that a client has sent."""


class Intake:
    """Brings adapters in, from folders, remote sources, uploads and compositions.

    Files are looked at by the reader, or on a thread of their own where that may be slow; outcomes come back
    on the engine's thread.

    Args:
        sites: of the base model.
        max_rank: largest rank that is served.
        max_uploaded: most adapters that clients sent, registered or on their way.
        base: the base model's weights.
        post: as for `Worker`.
    """

    def __init__(
        self,
        registry: Registry,
        versions: Versions,
        sources: Resolver,
        sites: SiteRegistry,
        *,
        max_rank: int,
        max_uploaded: int,
        base: FrozenBase | None,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._registry = registry
        self._versions = versions
        self._sources = sources
        self._sites = sites
        self._max_rank = max_rank
        self._max_uploaded = max_uploaded
        self._base = base
        self._composer = Composer(sites, sources)
        self._kinds: weakref.WeakValueDictionary[bytes, Kind] = weakref.WeakValueDictionary()
        self._fetchers = WorkerPool("adapter-fetcher", _MAX_FETCHES, post)

    @property
    def busy(self) -> bool:
        """True if files are being looked at, fetched or made."""
        return bool(self._registry.arriving or self._registry.replacing)

    def register_folder(self, folder: Path) -> list[str]:
        """Registers every adapter in `folder`: each subfolder with an `adapter_config.json`.

        One that cannot be served is logged and kept as broken, and requests for it get its error.

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
            broken = self._registry.broken.get(name)
            if broken is not None and broken.source != str(source):
                raise taken(name, broken.source, str(source))
            try:
                self.register(name, source)
            except AlreadyExistsError:
                raise
            except ServerError as error:
                _log.warning("%s", error)
                self._registry.broken[name] = Broken(str(source), error, stamp(source))
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
        known = self._registry.served.get(name)
        if known is not None and known.manifest.folder == folder:
            return known.status()
        self._registry.check_free(name, str(source))
        return self._versions.admit(name, str(source), self._read_manifest(name, folder)).status()

    def load(self, name: str, source: str, done: StatusCallback, *, inplace: bool = False) -> None:
        """Registers an adapter and brings it to host memory, in the background; fetches it first if need be.

        `done` is called from `AdapterStore.poll` with its status, or with the error for which nothing was
        registered.

        Args:
            inplace: if the name is taken, the new version replaces the registered one once it is read and
                checked. Of two such loads the later one counts.

        Raises:
            InvalidArgumentError: the name is bad.
            AlreadyExistsError: the name is taken.
            ResourceExhaustedError: too many adapters are being fetched.
        """
        inspection = self._begin(name, redact(source), done, inplace=inplace)
        slow = self._sources.is_remote(source)
        self._look_at(name, inspection, lambda: self._sources.resolve(source), slow=slow)

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
        inspection = self._begin(name, str(composition), done, inplace=inplace)
        records = [self.find(use.name) for use in composition.members]
        for record in records:
            check_member(record.manifest)
        members = [Member(record.manifest, record.content_hash) for record in records]

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
        source = f"{_UPLOAD}{sha256[WEIGHTS_FILE]}"
        inspection = self._begin(name, source, done, inplace=inplace)
        sources = [record.source for record in self._registry.served.values()]
        sources += [arriving.source for arriving in self._registry.arriving.values()]
        uploaded = sum(known.startswith(_UPLOAD) for known in sources)
        if uploaded >= self._max_uploaded and not inspection.inplace:
            raise ResourceExhaustedError(
                f"{uploaded} adapters are registered that clients sent, which is the most "
                "(--max-uploaded-adapters); unload one first",
                resource=("adapters", "uploaded"),
                reason=Reason.TOO_MANY_ADAPTERS,
            )
        key = entry_key("upload", *(f"{file} {digest}" for file, digest in sorted(sha256.items())))
        self._look_at(name, inspection, lambda: self._sources.land(key, staged, source), slow=True)

    def find(self, name: str) -> Record:
        """The version that a name means. A broken adapter is tried again if its files have changed.

        Raises:
            NotFoundError: there is no such adapter.
            ServerError: it was registered but cannot be served; the reason.
        """
        record = self._registry.served.get(name)
        if record is not None:
            return record
        broken = self._registry.broken.get(name)
        if broken is None:
            raise not_found(name)
        if not broken.may_have_healed():
            raise broken.error
        try:
            self.register(name, broken.source)
        except ServerError as error:
            self._registry.broken[name] = Broken(broken.source, error, stamp(Path(broken.source)))
            raise
        return self._registry.served[name]

    def follow(self, change: Change, unload: Callable[[str], None]) -> None:
        """Does what a change in a watched folder asks for; `unload` forgets an adapter."""
        name, source = change.folder.name, str(change.folder)
        known = self._registry.served.get(name)
        broken = self._registry.broken.get(name)
        ours = source in (known.source if known else None, broken.source if broken else None)
        if change.kind is ChangeKind.REMOVED:
            if ours:
                _log.info("adapter %r is unloaded: %s is gone", name, source)
                unload(name)
        elif known is not None and ours:
            # One that is not in memory cannot be served from its old files any more: its next read tells.
            read = known.blob is not None or known.slot is not None or known.reading
            self._look_at_folder(name, Inspection(source, log_outcome, read=read, inplace=True))
        elif change.kind is ChangeKind.ADDED or broken is not None:
            try:
                check_name(name)
                self._registry.check_free(name, source)
                self._look_at_folder(name, Inspection(source, log_outcome, read=False))
            except ServerError as error:
                _log.warning("%s is not registered: %s", source, error)

    def close(self) -> None:
        """Ends fetches and compositions; what they make is not taken up any more."""
        self._composer.close()
        self._fetchers.close(_STOP_FETCHES_S)

    def give_up(self, error: ServerError) -> None:
        """Answers whoever waits for files to be looked at."""
        for waiting in (self._registry.arriving, self._registry.replacing):
            for inspection in waiting.values():
                inspection.give_up(error)
            waiting.clear()

    def _begin(self, name: str, source: str, done: StatusCallback, *, inplace: bool) -> Inspection:
        """Raises: InvalidArgumentError, AlreadyExistsError: the name is bad, or taken and not replaced."""
        check_name(name)
        inplace = inplace and name in self._registry.served
        if not inplace:
            self._registry.check_free(name, source)
        return Inspection(source, done, inplace=inplace)

    def _look_at_folder(self, name: str, inspection: Inspection) -> None:
        self._look_at(name, inspection, lambda: self._sources.resolve(inspection.source), slow=False)

    def _look_at(self, name: str, inspection: Inspection, find: Callable[[], Path], *, slow: bool) -> None:
        """Has a folder found and inspected, by the reader, or on a thread of its own if that may be slow."""

        def inspect() -> AdapterManifest:
            folder = find()
            try:
                return self._read_manifest(name, folder)
            except BaseException:
                self._sources.release(folder)
                raise

        worker = self._fetchers if slow else self._versions.loading.reader
        worker.submit(inspect, lambda outcome: self._was_inspected(name, inspection, outcome))
        self._versions.abandon(name, superseded(name))
        self._registry.waiting(inplace=inspection.inplace)[name] = inspection
        self._registry.changes.touch(name)

    def _read_manifest(self, name: str, folder: Path) -> AdapterManifest:
        return read_manifest(
            name, folder, self._sites, self._sources.roots, self._max_rank, self._kinds, self._base
        )

    def _was_inspected(self, name: str, inspection: Inspection, outcome: Outcome[AdapterManifest]) -> None:
        manifest = outcome.result
        waiting = self._registry.waiting(inplace=inspection.inplace)
        try:
            if waiting.get(name) is not inspection:
                return
            del waiting[name]
            self._registry.changes.touch(name)
            if manifest is None:
                raise outcome.error or InternalError("nothing was read")
            # What it was to replace may have failed meanwhile.
            candidate = inspection.inplace and name in self._registry.served
            record = self._versions.admit(name, inspection.source, manifest, candidate=candidate)
        except ServerError as error:
            if not inspection.read and not inspection.inplace:
                source = inspection.source
                self._registry.broken[name] = Broken(source, error, stamp(Path(source)))
            inspection.done(error)
        else:
            if inspection.read:
                record.on_loaded = inspection.done
                self._versions.loading.demand(record)
            else:
                if candidate:
                    self._versions.swap(record)
                inspection.done(record.status())
        finally:
            # From here on the record holds it, or nobody.
            if manifest is not None:
                self._sources.release(manifest.folder)
