"""From the source of an adapter, wherever it lies, to a local folder with its files.

A path is looked up under the allowed roots (`sources`). Anything with a scheme is downloaded (`remote`): only
from under a prefix that the operator allows, only the files that an adapter consists of, within limits that
are checked before the first byte.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from loraplex_server.adapters.origins.remote.cache import DownloadCache, entry_key
from loraplex_server.adapters.origins.remote.download import Downloader, sha256_of
from loraplex_server.adapters.origins.remote.protocol import (
    Backend,
    ChangedError,
    RemoteFile,
    RemoteFolder,
)
from loraplex_server.adapters.origins.remote.registry import make_backend
from loraplex_server.adapters.origins.sources import resolve_folder
from loraplex_server.adapters.spec.refusals import head_refusal, pickle_refusal
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_cache import default_cache_dir
from loraplex_server.core.adapter_files import (
    BOTTLENECK_FILE,
    CONFIG_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    MAX_CONFIG_BYTES,
    MAX_EXTRA_FILE_BYTES,
    PICKLE_FILES,
    WEIGHTS_FILE,
)
from loraplex_server.core.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.source_uri import (
    HUB,
    AllowedSources,
    SourceUri,
    parse_uri,
    scheme_of,
)
from loraplex_server.core.text import quoted

_log = logging.getLogger(__name__)

_WEIGHTS_FILES = (WEIGHTS_FILE, BOTTLENECK_FILE)
_MOVING_TARGET_TRIES = 3


class Resolver(Protocol):
    """Source to local folder; the store asks no more of wherever adapters come from."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """Folders under which files of adapters may be opened."""

    def is_remote(self, source: str) -> bool:
        """Whether `resolve` may take long."""

    def resolve(self, source: str) -> Path:
        """The real folder with the adapter's files, verified as far as its source allows.

        The folder stays until `release`. Called from any thread; blocks. Raises any ServerError; its text
        names the source without credentials.
        """

    def find(self, folder: str | Path) -> Path:
        """The real folder of what is on disk already; never blocks for long."""

    def landed(self, key: str) -> Path | None:
        """What was landed under `key` before, if it is still there and whole; it stays until `release`."""

    def stage(self) -> Path:
        """A new empty folder in which to prepare what `land` takes."""

    def land(self, key: str, staged: Path, source: str) -> Path:
        """Keeps the files of a staged folder under `key`; the result stays until `release`. Blocks."""

    def retain(self, folder: Path) -> None:
        """Keeps a folder that was given for one more `release`."""

    def release(self, folder: Path) -> None:
        """Lets go of a folder."""

    def close(self) -> None:
        """Ends what `resolve` is at, which raises UnavailableError."""


class AdapterSources:
    """The resolver of a server: paths under its roots, and downloads from its allowed prefixes.

    Backends of the allowed schemes are imported here, so that what is missing shows at start.

    Raises:
        InvalidArgumentError: a prefix is malformed, or nobody serves its scheme.
        FailedPreconditionError: a library is not installed, or the cache's folder cannot be used.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._allowed = AllowedSources(config.sources)
        self._backends: dict[str, Backend] = {
            scheme: make_backend(scheme, self._allowed) for scheme in sorted(self._allowed.schemes)
        }
        self._cache: DownloadCache | None = None
        self._cache_lock = threading.Lock()
        if self._allowed or config.allow_uploads:
            self._open_cache()
        self._stop = threading.Event()
        self._downloader = Downloader(self._stop)
        self._slots = threading.BoundedSemaphore(config.max_downloads)
        self._lock = threading.Lock()
        self._under_way: dict[SourceUri, Future[Path]] = {}
        self._entry_locks: dict[str, tuple[threading.Lock, int]] = {}

    @property
    def roots(self) -> tuple[Path, ...]:
        """Allowed roots, and where downloads are kept."""
        cached = (self._cache.entries_folder,) if self._cache is not None else ()
        return self._config.allowed_roots + cached

    def is_remote(self, source: str) -> bool:
        """Whether `source` is downloaded, unless the cache has it."""
        return scheme_of(source) not in ("", "file")

    def find(self, folder: str | Path) -> Path:
        """A folder under the allowed roots, or one that was downloaded before.

        Raises:
            InvalidArgumentError, PermissionDeniedError, NotFoundError: as `resolve_folder`.
        """
        downloaded = Path(folder)
        if self._cache is not None and downloaded.parent == self._cache.entries_folder:
            if not downloaded.is_dir():
                raise NotFoundError("its downloaded copy is gone; unload it and load it again")
            return downloaded
        return resolve_folder(folder, self._config.allowed_roots)

    def resolve(self, source: str) -> Path:
        """The local folder of `source`; loads of one source share one download.

        Raises:
            InvalidArgumentError: it is malformed.
            PermissionDeniedError: it is not under an allowed root or prefix, or may not be read.
            NotFoundError: it, or a file that an adapter needs, is not there.
            FailedPreconditionError: it is too large, or is not what was pinned or announced.
            ResourceExhaustedError: the cache is full of what is in use.
            UnavailableError: it cannot be had now, several tries included.
        """
        scheme = scheme_of(source)
        if not scheme:
            return resolve_folder(source, self._config.allowed_roots)
        if scheme == "file":
            return resolve_folder(_path_of_file_uri(source), self._config.allowed_roots)
        uri = parse_uri(source)
        self._check_allowed(uri)
        try:
            return self._shared(uri)
        except ServerError as error:
            if error.info.resource or error.info.violations:
                raise
            text = str(error) if str(uri) in str(error) else f"source {quoted(str(uri))}: {error}"
            missing = isinstance(error, NotFoundError)
            raise type(error)(
                text,
                resource=("source", str(uri)),
                retry_after_s=error.info.retry_after_s,
                reason=Reason.SOURCE_NOT_FOUND if missing else error.info.reason,
            ) from error
        except Exception as error:
            if self._stop.is_set():
                # Connections are closed under those who still use them.
                raise UnavailableError("the server stops") from error
            raise

    def landed(self, key: str) -> Path | None:
        """Raises: FailedPreconditionError: it is in use, but was changed on disk."""
        self._open_cache()
        return self._intact(key, "what is kept")

    def stage(self) -> Path:
        """Raises: FailedPreconditionError: the cache's folder cannot be used."""
        return Path(tempfile.mkdtemp(dir=self._open_cache().staging_folder))

    def land(self, key: str, staged: Path, source: str) -> Path:
        """Raises: FailedPreconditionError, ResourceExhaustedError: there is no room for it in the cache."""
        cache = self._open_cache()
        if staged.parent != cache.staging_folder:
            raise InternalError(f"{staged} was not staged")
        with self._entry_lock(key):
            folder = self._intact(key, source)
            if folder is not None:
                return folder
            files = sorted(staged.iterdir())
            digests = {file.name: sha256_of(file) for file in files}
            partial = cache.begin(key, sum(file.stat().st_size for file in files))
            committed = False
            try:
                for file in files:
                    file.replace(partial / file.name)
                folder = cache.commit(key, {"source": source, "sha256": digests})
                committed = True
            finally:
                if not committed:
                    cache.end(key, keep=False)
        return folder

    def retain(self, folder: Path) -> None:
        """Raises: NotFoundError if `folder` was downloaded and is gone."""
        if self._cache is not None:
            self._cache.retain(folder)

    def release(self, folder: Path) -> None:
        """Downloads that nobody holds may be evicted; other folders are not ours."""
        if self._cache is not None:
            self._cache.release(folder)

    def close(self) -> None:
        """Ends downloads at their next chunk, and gives the cache's folder back."""
        self._stop.set()
        for backend in self._backends.values():
            backend.close()
        if self._cache is not None:
            self._cache.close()

    def _open_cache(self) -> DownloadCache:
        """The cache; made when it is first needed, since a server without it leaves its folder to others."""
        with self._cache_lock:
            if self._cache is None:
                config = self._config
                self._cache = DownloadCache(config.cache_dir or default_cache_dir(), config.cache_bytes)
            return self._cache

    def _check_allowed(self, uri: SourceUri) -> None:
        if not self._allowed:
            raise PermissionDeniedError(
                f"source {quoted(str(uri))}: this server loads nothing from elsewhere; its operator allows "
                "it with --adapter-source",
                resource=("source", str(uri)),
                reason=Reason.SOURCE_NOT_ALLOWED,
            )
        self._allowed.check(uri)
        if uri.scheme == HUB and self._config.require_commit and not uri.is_pinned:
            raise InvalidArgumentError.field(
                "source",
                f"{quoted(str(uri))} names no commit; this server wants hf://owner/name@<40 hex digits>",
            )

    def _shared(self, uri: SourceUri) -> Path:
        """`_fetch`, with all who want the same at once waiting for the first of them."""
        assert self._cache is not None
        with self._lock:
            future = self._under_way.get(uri)
            first = future is None
            if future is None:
                future = self._under_way[uri] = Future()
        if not first:
            folder = future.result()
            try:
                self._cache.retain(folder)
            except NotFoundError:
                # It came, went out of use and was evicted before this thread ran.
                return self._shared(uri)
            return folder
        try:
            folder = self._fetch(uri)
        except BaseException as error:
            with self._lock:
                del self._under_way[uri]
            future.set_exception(error)
            raise
        with self._lock:
            del self._under_way[uri]
        future.set_result(folder)
        return folder

    def _fetch(self, uri: SourceUri) -> Path:
        """The verified folder, from the cache if it is there and still current."""
        assert self._cache is not None
        by_commit = entry_key(str(uri), *self._config.extra_files)
        if uri.is_pinned and (folder := self._cached(by_commit, uri)) is not None:
            return folder
        for attempt in range(_MOVING_TARGET_TRIES):
            remote = self._backends[uri.scheme].open(uri)
            with self._slot():
                files = self._list(remote)
                # A file without a version may be another next time: then no entry is ever found again.
                versions = (
                    f"{file.name} {file.size} {file.version or secrets.token_hex()}" for file in files
                )
                key = by_commit if uri.is_pinned else entry_key(str(uri), *versions)
                try:
                    with self._entry_lock(key):
                        folder = self._cached(key, uri)
                        return folder or self._download(uri, remote, files, key)
                except ChangedError:
                    if attempt == _MOVING_TARGET_TRIES - 1:
                        raise
        raise AssertionError("the last attempt returned or raised")

    def _list(self, remote: RemoteFolder) -> list[RemoteFile]:
        """The files to fetch, within the limits.

        Raises:
            NotFoundError: one that an adapter needs is missing.
            FailedPreconditionError: one is too large.
        """
        files = [self._stat(remote, CONFIG_FILE), self._stat_weights(remote)]
        optional = self._config.extra_files
        if files[1].name == BOTTLENECK_FILE:
            optional = tuple(dict.fromkeys((*optional, INTERFACE_FILE)))
            for name in HEAD_FILES:
                if self._is_there(remote, name):
                    raise FailedPreconditionError(head_refusal(name))
        for name in optional:
            with contextlib.suppress(NotFoundError):
                files.append(self._stat(remote, name))
        for file in files:
            limit = MAX_CONFIG_BYTES if file.name == CONFIG_FILE else MAX_EXTRA_FILE_BYTES
            if file.name not in _WEIGHTS_FILES and file.size > limit:
                raise FailedPreconditionError(f"{file.name} has {file.size} bytes; at most {limit} are taken")
        total = sum(file.size for file in files)
        if total > self._config.download_max_bytes:
            raise FailedPreconditionError(
                f"it has {total} bytes; at most {self._config.download_max_bytes} are downloaded "
                "(--adapter-download-max-bytes)"
            )
        return files

    def _stat_weights(self, remote: RemoteFolder) -> RemoteFile:
        try:
            return self._stat(remote, WEIGHTS_FILE)
        except NotFoundError:
            with contextlib.suppress(NotFoundError):
                return self._stat(remote, BOTTLENECK_FILE)
            for name in PICKLE_FILES:
                if self._is_there(remote, name):
                    raise FailedPreconditionError(pickle_refusal(name)) from None
            raise

    def _is_there(self, remote: RemoteFolder, name: str) -> bool:
        try:
            self._stat(remote, name)
        except (NotFoundError, PermissionDeniedError):
            # Object stores may call forbidden what is not there.
            return False
        return True

    def _stat(self, remote: RemoteFolder, name: str) -> RemoteFile:
        return self._downloader.attempt(lambda: remote.stat(name), remote.attempts)

    def _cached(self, key: str, uri: SourceUri) -> Path | None:
        """A complete entry whose files are still what was downloaded, held; None if there is none.

        Raises:
            FailedPreconditionError: it is not what `uri` pins, or was changed on disk while in use.
        """
        assert self._cache is not None
        folder = self._intact(key, str(uri))
        if folder is None:
            return None
        digests: dict[str, str] = self._cache.record(folder)["sha256"]
        for name, pin in _pins(uri).items():
            if pin and digests.get(name, pin) != pin:
                self._cache.release(folder)
                raise FailedPreconditionError(f"{name} has SHA-256 {digests[name]}, and {pin} was asked for")
        return folder

    def _intact(self, key: str, source: str) -> Path | None:
        """A complete entry whose files are still what they were, held; None if there is none."""
        assert self._cache is not None
        folder = self._cache.lookup(key)
        if folder is None:
            return None
        digests: dict[str, str] = self._cache.record(folder)["sha256"]
        if all(sha256_of(folder / name) == digest for name, digest in digests.items()):
            return folder
        _log.warning("the downloaded copy of %s was changed on disk", source)
        if self._cache.discard(folder):
            return None
        raise FailedPreconditionError(
            "its downloaded copy was changed on disk; unload what was loaded from it, then load it anew"
        )

    def _download(self, uri: SourceUri, remote: RemoteFolder, files: list[RemoteFile], key: str) -> Path:
        assert self._cache is not None
        pins = _pins(uri)
        for file in files:
            pin = pins.get(file.name, "")
            if pin and file.sha256 not in ("", pin):
                raise FailedPreconditionError(
                    f"{file.name} has SHA-256 {file.sha256}, and {pin} was asked for"
                )
        total = sum(file.size for file in files)
        partial = self._cache.begin(key, total)
        committed = full = False
        try:
            digests = {
                file.name: self._downloader.download(
                    remote, file, partial / file.name, pins.get(file.name, "")
                )
                for file in files
            }
            folder = self._cache.commit(key, {"source": str(uri), "sha256": digests})
            committed = True
        except ResourceExhaustedError as error:
            full = error.info.reason == Reason.DISK_FULL
            raise
        finally:
            if not committed:
                self._cache.end(key, keep=not full)
            if full:
                self._cache.empty()
        _log.info("downloaded %s, %d bytes", uri, total)
        return folder

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the downloads that may run at once."""
        while not self._slots.acquire(timeout=0.2):
            if self._stop.is_set():
                raise UnavailableError("the server stops")
        try:
            yield
        finally:
            self._slots.release()

    @contextlib.contextmanager
    def _entry_lock(self, key: str) -> Iterator[None]:
        """Keeps two spellings of one source, differing in credentials say, from one partial download."""
        with self._lock:
            lock, users = self._entry_locks.get(key, (threading.Lock(), 0))
            self._entry_locks[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._entry_locks.pop(key)
                if users > 1:
                    self._entry_locks[key] = lock, users - 1


def _pins(uri: SourceUri) -> dict[str, str]:
    return {**dict.fromkeys(_WEIGHTS_FILES, uri.sha256), CONFIG_FILE: uri.config_sha256}


def _path_of_file_uri(source: str) -> str:
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise InvalidArgumentError.field("source", f"{quoted(source)} is no file:// address of this machine")
    return unquote(parts.path)
