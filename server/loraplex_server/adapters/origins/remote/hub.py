"""Adapters on the Hugging Face hub, through huggingface_hub: its addresses, session, token and offline mode.

A branch or tag is resolved to its commit by the first file, so that all files are of one commit. Where the
hub's offline mode is on, what the hub's own cache holds is taken from there.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import build_hf_headers, get_session

from loraplex_server.adapters.origins.remote.protocol import (
    CHUNK_BYTES,
    TIMEOUT_S,
    ChangedError,
    RemoteFile,
    RemoteFolder,
    error_of_status,
)
from loraplex_server.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.source_uri import AllowedSources, SourceUri

_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


class HubBackend:
    """The hub at HF_ENDPOINT. Where it redirects to its own storage is the hub's affair."""

    def __init__(self, _: AllowedSources) -> None:
        pass

    def open(self, uri: SourceUri) -> RemoteFolder:
        return _HubFolder(uri)

    def close(self) -> None:
        # The session is shared with whoever else uses the library.
        pass


class _HubFolder:
    attempts = 4

    def __init__(self, uri: SourceUri) -> None:
        self._uri = uri
        self._revision = uri.revision or "main"

    def stat(self, name: str) -> RemoteFile:
        if huggingface_hub.is_offline_mode():
            return self._stat_cached(name)
        url = self._url(name)
        try:
            metadata = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_S)
        except Exception as error:
            raise self._typed(error, name) from error
        if metadata.size is None or not metadata.etag:
            raise FailedPreconditionError(f"{self._what(name)}: the hub does not say its size and etag")
        if metadata.commit_hash:
            self._revision = metadata.commit_hash
            url = self._url(name)
        return _remote_file(name, metadata.size, metadata.etag, url)

    def read(self, file: RemoteFile, offset: int) -> Generator[bytes, None, None]:
        if not file.location.startswith(("http://", "https://")):
            yield from _read_local(Path(file.location), offset)
            return
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        what = self._what(file.name)
        try:
            with get_session().stream(
                "GET", file.location, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
            ) as response:
                if response.status_code == 416:
                    raise ChangedError(f"{what} was replaced during its download")
                if response.status_code not in (200, 206):
                    raise error_of_status(response.status_code, what)
                skip = offset if response.status_code == 200 else 0
                # In pieces as they come: collected ones would be lost when the connection breaks.
                for chunk in response.iter_raw():
                    skipped = min(skip, len(chunk))
                    skip -= skipped
                    if skipped < len(chunk):
                        yield chunk[skipped:]
        except (hub_errors.HTTPError, OSError) as error:
            raise self._typed(error, file.name) from error

    def _stat_cached(self, name: str) -> RemoteFile:
        path = "/".join([*self._uri.segments[1:], name])
        found = huggingface_hub.try_to_load_from_cache(self._uri.repo_id, path, revision=self._revision)
        if not isinstance(found, str):
            raise FailedPreconditionError(
                f"{self._what(name)} is not in the hub's cache, and offline mode (HF_HUB_OFFLINE) is on; "
                "download it beforehand or turn offline mode off"
            )
        # The cache names its blobs by etag, and its snapshots by commit.
        self._revision = Path(found).parents[len(self._uri.segments) - 1].name
        blob = Path(found).resolve()
        return _remote_file(name, blob.stat().st_size, blob.name, str(blob))

    def _url(self, name: str) -> str:
        subfolder = "/".join(self._uri.segments[1:]) or None
        return str(
            huggingface_hub.hf_hub_url(self._uri.repo_id, name, subfolder=subfolder, revision=self._revision)
        )

    def _typed(self, error: Exception, name: str) -> ServerError:
        what = self._what(name)
        match error:
            case ServerError():
                return error
            case hub_errors.GatedRepoError() | hub_errors.DisabledRepoError():
                return PermissionDeniedError(f"{what}: the hub denies access; check the server's HF_TOKEN")
            case hub_errors.RepositoryNotFoundError():
                return NotFoundError(f"{what}: no such repository, or HF_TOKEN may not see it")
            case hub_errors.RevisionNotFoundError():
                return NotFoundError(f"{what}: the repository has no such revision")
            case hub_errors.EntryNotFoundError():
                return NotFoundError(f"{what} is not there")
            case hub_errors.OfflineModeIsEnabled():
                return FailedPreconditionError(f"{what}: the hub's offline mode (HF_HUB_OFFLINE) is on")
            case hub_errors.HFValidationError():
                return InvalidArgumentError.field("source", f"{str(self._uri)!r} is not a name on the hub")
            case hub_errors.HfHubHTTPError() if error.response is not None:
                return error_of_status(error.response.status_code, what)
        return UnavailableError(f"{what} is not available now: {type(error).__name__}")

    def _what(self, name: str) -> str:
        return f"{name} of {str(self._uri)!r}"


def _remote_file(name: str, size: int, etag: str, location: str) -> RemoteFile:
    """The hub's etag is the SHA-256 of a large file and the git object id of a small one."""
    sha256 = etag if _SHA256.fullmatch(etag) else ""
    git_sha1 = etag if _SHA1.fullmatch(etag) else ""
    return RemoteFile(name, size, etag, sha256, git_sha1, location)


def _read_local(path: Path, offset: int) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
