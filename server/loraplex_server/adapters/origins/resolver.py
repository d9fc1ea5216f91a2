"""From the source of an adapter, wherever it lies, to a local folder with its files.

A path is looked up under the allowed roots (`sources`). Anything with a scheme is downloaded (`remote`): only
from under a prefix that the operator allows, only the files that an adapter consists of, within limits that
are checked before the first byte.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from loraplex_server.adapters.origins.remote.cache import DownloadCache
from loraplex_server.adapters.origins.remote.fetch import Fetcher
from loraplex_server.adapters.origins.remote.protocol import (
    Backend,
)
from loraplex_server.adapters.origins.remote.registry import make_backend
from loraplex_server.adapters.origins.remote.verified import VerifiedCache
from loraplex_server.adapters.origins.sources import resolve_folder
from loraplex_server.config import AdapterConfig
from loraplex_server.core.adapter_cache import cache_folder
from loraplex_server.core.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
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


class Resolver(Protocol):
    """Source to local folder; the store asks no more of wherever adapters come from."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """Folders under which files of adapters may be opened."""

    def is_remote(self, source: str) -> bool:
        """True if `resolve` may take long."""

    def resolve(self, source: str) -> Path:
        """The real folder with the adapter's files, verified as far as its source allows.

        The folder stays until `release`. Called from any thread; blocks. Raises any ServerError; its text
        names the source without credentials.
        """

    def find(self, folder: str | Path) -> Path:
        """The real folder of what is on disk already; never blocks for long."""

    def landed(self, key: str) -> Path | None:
        """The folder that was landed under `key`, if it is there and whole; it stays until `release`."""

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
        self._cache: VerifiedCache | None = None
        self._cache_lock = threading.Lock()
        self._stop = threading.Event()
        self._fetcher: Fetcher | None = None
        if self._allowed:
            self._fetcher = Fetcher(self._open_cache(), self._backends, config, self._stop)
        elif config.allow_uploads:
            self._open_cache()

    @property
    def roots(self) -> tuple[Path, ...]:
        """Allowed roots, and where downloads are kept."""
        cached = (self._cache.files.entries_folder,) if self._cache is not None else ()
        return self._config.allowed_roots + cached

    def is_remote(self, source: str) -> bool:
        """True if `source` is downloaded, unless the cache has it."""
        return scheme_of(source) not in ("", "file")

    def find(self, folder: str | Path) -> Path:
        """A folder under the allowed roots, or one that was downloaded before.

        Raises:
            InvalidArgumentError, PermissionDeniedError, NotFoundError: as `resolve_folder`.
        """
        downloaded = Path(folder)
        if self._cache is not None and downloaded.parent == self._cache.files.entries_folder:
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
        fetcher = self._fetcher_for(uri)
        try:
            return fetcher.fetch(uri)
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
        return self._open_cache().intact(key, "what is kept")

    def stage(self) -> Path:
        """Raises: FailedPreconditionError: the cache's folder cannot be used."""
        return Path(tempfile.mkdtemp(dir=self._open_cache().files.staging_folder))

    def land(self, key: str, staged: Path, source: str) -> Path:
        """Raises: FailedPreconditionError, ResourceExhaustedError: there is no room for it in the cache."""
        return self._open_cache().land(key, staged, source)

    def retain(self, folder: Path) -> None:
        """Raises: NotFoundError if `folder` was downloaded and is gone."""
        if self._cache is not None:
            self._cache.files.retain(folder)

    def release(self, folder: Path) -> None:
        """Downloads that nobody holds may be evicted; other folders are not ours."""
        if self._cache is not None:
            self._cache.files.release(folder)

    def close(self) -> None:
        """Ends downloads at their next chunk, and gives the cache's folder back."""
        self._stop.set()
        for backend in self._backends.values():
            backend.close()
        if self._cache is not None:
            self._cache.files.close()

    def _open_cache(self) -> VerifiedCache:
        """The cache; made when it is first needed, since a server without it leaves its folder to others."""
        with self._cache_lock:
            if self._cache is None:
                config = self._config
                files = DownloadCache(cache_folder(config.cache_dir), config.cache_bytes)
                self._cache = VerifiedCache(files)
            return self._cache

    def _fetcher_for(self, uri: SourceUri) -> Fetcher:
        """Raises: PermissionDeniedError, InvalidArgumentError: the operator does not allow this source."""
        if self._fetcher is None:
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
        return self._fetcher


def _path_of_file_uri(source: str) -> str:
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise InvalidArgumentError.field("source", f"{quoted(source)} is not a file:// URL of this machine")
    return unquote(parts.path)
