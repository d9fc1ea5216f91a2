"""What a place that adapters are fetched from has to offer, and which one a scheme means.

A backend only says what a file is and sends its bytes from an offset on. Limits, resuming, verification and
the cache are the downloader's, and so the same for all.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from loraplex_server.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.source_uri import AllowedSources, SourceUri

ENTRY_POINTS = "loraplex.adapter_backends"
"""Group of entry points, named by scheme, through which other packages add backends."""

CHUNK_BYTES = 4 << 20
TIMEOUT_S = 30.0


class ChangedError(UnavailableError):
    """A remote file is no longer what it was when the download began."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as it is now.

    Attributes:
        version: etag, or whatever changes with the content; "" if the place gives none, and then a broken
            download begins anew.
        sha256: of the content, "" if the place does not say.
        git_sha1: object id of the content in git, "" if it does not say.
        location: where its bytes are, if the backend needs to remember that.
    """

    name: str
    size: int
    version: str
    sha256: str = ""
    git_sha1: str = ""
    location: str = ""


class RemoteFolder(Protocol):
    """One remote adapter. Methods block, and are called from one thread.

    All raise NotFoundError, PermissionDeniedError, FailedPreconditionError, or UnavailableError for what may
    succeed when tried again.
    """

    attempts: int
    """How often a call is made until it succeeds; few if the backend tries again itself."""

    def stat(self, name: str) -> RemoteFile:
        """The file of that name as it is now."""

    def read(self, file: RemoteFile, offset: int) -> Generator[bytes, None, None]:
        """Its bytes from `offset` on, in chunks; ChangedError if it is another version by now."""


class Backend(Protocol):
    """All folders of a scheme. `open` is called from several threads."""

    def open(self, uri: SourceUri) -> RemoteFolder:
        """Connects nothing yet."""

    def close(self) -> None:
        """Ends its connections."""


BackendFactory = Callable[[AllowedSources], Backend]
"""Makes a backend; it must follow no redirect to where the given prefixes do not allow."""

_factories: dict[str, BackendFactory] = {}


def register_backend(scheme: str, factory: BackendFactory) -> None:
    """Has `scheme` served by `factory` in this process, also if it was served by another before.

    The engine runs in a process of its own: a package that is to be found there declares an entry point of
    the group `loraplex.adapter_backends`, named by the scheme.
    """
    _factories[scheme] = factory


def make_backend(scheme: str, allowed: AllowedSources) -> Backend:
    """The backend of a scheme.

    Raises:
        InvalidArgumentError: nothing serves it.
        FailedPreconditionError: its package is not installed; the text says which extra has it.
    """
    factory = _factories.get(scheme) or _built_in(scheme) or _entry_point(scheme)
    if factory is None:
        raise InvalidArgumentError.field("adapter_sources", f"nothing is installed for {scheme}://")
    try:
        return factory(allowed)
    except ImportError as error:
        raise FailedPreconditionError(
            f"{scheme}:// needs {error.name or error}, which is not installed; pip install 'loraplex[remote]'"
        ) from error


def _built_in(scheme: str) -> BackendFactory | None:
    # Each brings libraries that only its own users need.
    match scheme:
        case "hf":
            from loraplex_server.adapters.origins.remote.hub import HubBackend

            return HubBackend
        case "https" | "http":
            from loraplex_server.adapters.origins.remote.web import WebBackend

            return WebBackend
        case "s3" | "gs" | "az":
            from loraplex_server.adapters.origins.remote.cloud import CloudBackend

            return lambda _: CloudBackend(scheme)
    return None


def _entry_point(scheme: str) -> BackendFactory | None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=scheme):
        factory: BackendFactory = entry_point.load()
        return factory
    return None


def error_of_status(status: int, what: str) -> ServerError:
    """The error that an HTTP status of 400 or more means for a download of `what`."""
    if status in (401, 403, 407, 451):
        return PermissionDeniedError(
            f"{what} may not be read (HTTP {status}); check the server's credentials"
        )
    if status in (404, 410):
        return NotFoundError(f"{what} is not there")
    if status in (408, 425, 429) or status >= 500:
        return UnavailableError(f"{what} cannot be had now (HTTP {status})")
    return FailedPreconditionError(f"{what} was refused (HTTP {status})")
