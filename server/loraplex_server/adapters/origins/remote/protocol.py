"""The protocol of a place that adapters are fetched from, and its errors.

A backend only says what a file is and sends its bytes from an offset on. Limits, resuming, verification and
the cache are the downloader's, and so the same for all.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from loraplex_server.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.source_uri import SourceUri

CHUNK_BYTES = 4 << 20
"""Bytes read at once; each download that runs holds as many."""

TIMEOUT_S = 30.0
"""Longest silence of a server. Object stores may take some seconds to the first byte."""


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
    """Most tries of a call; few if the backend tries again itself."""

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


def error_of_status(status: int, what: str) -> ServerError:
    """The error that an HTTP status of 400 or more means for a download of `what`."""
    if status in (401, 403, 407, 451):
        return PermissionDeniedError(
            f"{what} may not be read (HTTP {status}); check the server's credentials"
        )
    if status in (404, 410):
        return NotFoundError(f"{what} is not there")
    if status in (408, 425, 429) or status >= 500:
        return UnavailableError(f"{what} is not available now (HTTP {status})")
    return FailedPreconditionError(f"{what} was refused (HTTP {status})")
