"""One remote adapter to a folder of the cache: which files it has, within limits, downloaded and verified."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

from loraplex_server.adapters.origins.remote.cache import entry_key
from loraplex_server.adapters.origins.remote.download import Downloader
from loraplex_server.adapters.origins.remote.protocol import Backend, ChangedError, RemoteFile, RemoteFolder
from loraplex_server.adapters.origins.remote.verified import VerifiedCache
from loraplex_server.adapters.spec.refusals import head_refusal, pickle_refusal
from loraplex_server.config import AdapterConfig
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
    NotFoundError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from loraplex_server.core.source_uri import SourceUri

_log = logging.getLogger(__name__)

_WEIGHTS_FILES = (WEIGHTS_FILE, BOTTLENECK_FILE)

_MOVING_TARGET_TRIES = 3
"""Tries of a download whose files are replaced meanwhile; a source that changes on and on is given up."""

_LOOK_EVERY_S = 0.2
"""Pause between two looks of a waiting download whether the server stops."""


class Fetcher:
    """Fetches adapters; called from several threads.

    Args:
        backends: by scheme.
        stop: set to end what is under way with UNAVAILABLE.
    """

    def __init__(
        self,
        cache: VerifiedCache,
        backends: Mapping[str, Backend],
        config: AdapterConfig,
        stop: threading.Event,
    ) -> None:
        self._cache = cache
        self._backends = backends
        self._config = config
        self._stop = stop
        self._downloader = Downloader(stop)
        self._slots = threading.BoundedSemaphore(config.max_downloads)
        self._lock = threading.Lock()
        self._under_way: dict[SourceUri, Future[Path]] = {}

    def fetch(self, uri: SourceUri) -> Path:
        """The verified folder of a source, held until it is released. Who want it at once share a download.

        Raises:
            NotFoundError, PermissionDeniedError: it, or a file that an adapter needs, is not there or hidden.
            FailedPreconditionError: it is too large, or is not what was pinned or announced.
            ResourceExhaustedError: the cache is full of what is in use.
            UnavailableError: it cannot be had now, several tries included.
        """
        with self._lock:
            future = self._under_way.get(uri)
            first = future is None
            if future is None:
                future = self._under_way[uri] = Future()
        if not first:
            folder = future.result()
            try:
                self._cache.files.retain(folder)
            except NotFoundError:
                # It came, went out of use and was evicted before this thread ran.
                return self.fetch(uri)
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
                    with self._cache.locked(key):
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
        folder = self._cache.intact(key, str(uri))
        if folder is None:
            return None
        digests: dict[str, str] = self._cache.files.record(folder)["sha256"]
        for name, pin in _pins(uri).items():
            if pin and digests.get(name, pin) != pin:
                self._cache.files.release(folder)
                raise FailedPreconditionError(f"{name} has SHA-256 {digests[name]}, and {pin} was asked for")
        return folder

    def _download(self, uri: SourceUri, remote: RemoteFolder, files: list[RemoteFile], key: str) -> Path:
        pins = _pins(uri)
        for file in files:
            pin = pins.get(file.name, "")
            if pin and file.sha256 not in ("", pin):
                raise FailedPreconditionError(
                    f"{file.name} has SHA-256 {file.sha256}, and {pin} was asked for"
                )
        total = sum(file.size for file in files)
        partial = self._cache.files.begin(key, total)
        committed = full = False
        try:
            digests = {
                file.name: self._downloader.download(
                    remote, file, partial / file.name, pins.get(file.name, "")
                )
                for file in files
            }
            folder = self._cache.files.commit(key, {"source": str(uri), "sha256": digests})
            committed = True
        except ResourceExhaustedError as error:
            full = error.info.reason == Reason.DISK_FULL
            raise
        finally:
            if not committed:
                self._cache.files.end(key, keep=not full)
            if full:
                self._cache.files.empty()
        _log.info("downloaded %s, %d bytes", uri, total)
        return folder

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the downloads that may run at once."""
        while not self._slots.acquire(timeout=_LOOK_EVERY_S):
            if self._stop.is_set():
                raise UnavailableError("the server stops")
        try:
            yield
        finally:
            self._slots.release()


def _pins(uri: SourceUri) -> dict[str, str]:
    return {**dict.fromkeys(_WEIGHTS_FILES, uri.sha256), CONFIG_FILE: uri.config_sha256}
