"""Adapters in object stores, through fsspec: s3:// (s3fs), gs:// (gcsfs), az:// (adlfs).

Credentials and endpoints are those of each library's environment: AWS_*, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_*; fsspec's own configuration files work as well.
"""

from __future__ import annotations

import errno
import importlib
import threading
from collections.abc import Generator
from typing import Any

from loraplex_server.adapters.origins.remote.protocol import (
    CHUNK_BYTES,
    ChangedError,
    RemoteFile,
    RemoteFolder,
    error_of_status,
)
from loraplex_server.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.source_uri import SourceUri

_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
# What the libraries call a version of an object's content, most exact first.
_VERSION_FIELDS = ("ETag", "etag", "generation", "last_modified", "LastModified", "updated")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


class CloudBackend:
    """One object store. Its connections are made at the first download."""

    def __init__(self, scheme: str) -> None:
        # Now, not then: importing takes long, and a missing library is to be known at start.
        importlib.import_module(_LIBRARIES[scheme])
        self._fsspec: Any = importlib.import_module("fsspec")
        self._scheme = scheme
        self._lock = threading.Lock()
        self._filesystem: Any = None

    def open(self, uri: SourceUri) -> RemoteFolder:
        with self._lock:
            if self._filesystem is None:
                try:
                    self._filesystem = self._fsspec.filesystem(
                        self._scheme, use_listings_cache=False, skip_instance_cache=True
                    )
                except Exception as error:
                    raise _typed(error, str(uri)) from error
        return _CloudFolder(self._filesystem, uri)

    def close(self) -> None:
        # The libraries end their sessions when the last reference goes.
        with self._lock:
            self._filesystem = None


class _CloudFolder:
    # The libraries try again themselves.
    attempts = 2

    def __init__(self, filesystem: Any, uri: SourceUri) -> None:
        self._filesystem = filesystem
        self._uri = uri

    def stat(self, name: str) -> RemoteFile:
        key = self._uri.key(name)
        try:
            info = self._filesystem.info(key)
        except Exception as error:
            raise _typed(error, self._what(name)) from error
        if info.get("type") != "file" or not isinstance(info.get("size"), int):
            raise NotFoundError(f"{self._what(name)} is not there")
        version = next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), "")
        return RemoteFile(name, info["size"], version, location=key)

    def read(self, file: RemoteFile, offset: int) -> Generator[bytes, None, None]:
        while offset < file.size:
            end = min(offset + CHUNK_BYTES, file.size)
            try:
                chunk = self._filesystem.cat_file(file.location, start=offset, end=end)
            except Exception as error:
                raise _typed(error, self._what(file.name)) from error
            if len(chunk) != end - offset:
                raise UnavailableError(f"{self._what(file.name)} ended early")
            yield chunk
            offset = end
        # Ranges are separate requests, between which the object may have been replaced.
        if self.stat(file.name) != file:
            raise ChangedError(f"{self._what(file.name)} was replaced during its download")

    def _what(self, name: str) -> str:
        return f"{name} of {str(self._uri)!r}"


def _typed(error: Exception, what: str) -> ServerError:
    """The libraries' many errors, by HTTP status where they have one."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{what} is not there")
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return PermissionDeniedError(f"{what} may not be read; check the server's credentials")
    if names & set(_NO_CREDENTIALS):
        return PermissionDeniedError(f"{what} needs credentials, and the server's environment has none")
    for attribute in ("status", "status_code", "code"):
        status = getattr(error, attribute, None)
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int) and status >= 400:
            return error_of_status(status, what)
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return FailedPreconditionError(f"{what} cannot be read: {type(error).__name__}")
    return UnavailableError(f"{what} is not available now: {type(error).__name__}")
