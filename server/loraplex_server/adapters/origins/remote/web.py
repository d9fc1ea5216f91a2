"""Adapters on web servers, through fsspec's HTTP session (aiohttp), which carries the operator's settings.

Redirects are followed here, one by one, because each has to lead to an allowed prefix.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import re
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

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
    PermissionDeniedError,
    ServerError,
    UnavailableError,
)
from loraplex_server.core.source_uri import AllowedSources, SourceUri, parse_uri, redact
from loraplex_server.core.text import quoted

_MAX_REDIRECTS = 5
"""Redirects that are followed; a longer chain is taken for a loop."""
_REDIRECTS = (301, 302, 303, 307, 308)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")


class WebBackend:
    """All web servers; one session, which is made at the first download."""

    def __init__(self, allowed: AllowedSources) -> None:
        self._allowed = allowed
        self._aiohttp: Any = importlib.import_module("aiohttp")
        self._http: Any = importlib.import_module("fsspec.implementations.http")
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._session: Any = None
        self._pending: set[Future[Any]] = set()
        # Open ones. They belong to the event loop's thread.
        self._responses: set[Any] = set()
        self._closed = False

    def open(self, uri: SourceUri) -> RemoteFolder:
        return _WebFolder(self, uri)

    def close(self) -> None:
        """Ends what waits for a server, too, with UNAVAILABLE."""
        with self._lock:
            self._closed = True
            for future in self._pending:
                future.cancel()
            if self._session is not None:
                asyncio.run_coroutine_threadsafe(self._disconnect(), self._filesystem.loop).result()

    def call(self, what: str, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        """Runs `work` on fsspec's event loop and waits for it; its errors come back typed."""
        try:
            return self._start(work, *arguments).result()
        except CancelledError as error:
            raise UnavailableError(f"{what} is not available now: the server stops") from error
        except ServerError:
            raise
        except (TimeoutError, self._aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"{what} is not available now: {type(error).__name__}") from error

    def close_response(self, response: Any) -> None:
        """Ends a response, read or not; also after `close`."""
        self._filesystem.loop.call_soon_threadsafe(self._end, response)

    async def get(self, url: str, headers: Mapping[str, str], authorization: str, what: str) -> Any:
        """An open response to a GET, below 400 or 416; the caller closes it."""
        origin = _origin(url)
        for _ in range(_MAX_REDIRECTS + 1):
            sent = dict(headers)
            if authorization and _origin(url) == origin:
                sent["Authorization"] = authorization
            response = await self._session.get(
                self._filesystem.encode_url(url),
                headers=sent,
                allow_redirects=False,
                timeout=self._aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S),
            )
            if response.status in _REDIRECTS:
                target = response.headers.get("Location", "")
                response.close()
                url = self._redirected(urljoin(url, target), what)
                continue
            if response.status in (200, 206, 416):
                self._responses.add(response)
                return response
            response.close()
            if response.status >= 400:
                raise error_of_status(response.status, what)
            raise FailedPreconditionError(f"{what} was answered with HTTP {response.status}")
        raise FailedPreconditionError(f"{what} is redirected more than {_MAX_REDIRECTS} times")

    def _end(self, response: Any) -> None:
        self._responses.discard(response)
        response.close()

    async def _disconnect(self) -> None:
        # One may have come for a call that was just cancelled.
        for response in list(self._responses):
            self._end(response)
        await self._session.close()

    def _redirected(self, url: str, what: str) -> str:
        """The allowed address that a redirect leads to, its host as it was compared."""
        try:
            uri = parse_uri(url.partition("#")[0])
        except InvalidArgumentError:
            uri = None
        if uri is None or not self._allowed.permits(uri):
            raise PermissionDeniedError(
                f"{what} is redirected to {quoted(redact(url))}, which no allowed prefix covers "
                "(--adapter-source)"
            )
        # The path stays as it was sent: a signature may depend on its spelling.
        parts = urlsplit(url)
        return f"{uri.scheme}://{uri.host}{parts.path}" + (f"?{parts.query}" if parts.query else "")

    def _start(self, work: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise CancelledError
            if self._session is None:
                # Our addresses are encoded already.
                self._filesystem = self._http.HTTPFileSystem(encoded=True, skip_instance_cache=True)
                self._session = asyncio.run_coroutine_threadsafe(
                    self._filesystem.set_session(), self._filesystem.loop
                ).result()
            self._pending = {future for future in self._pending if not future.done()}
            future = asyncio.run_coroutine_threadsafe(work(*arguments), self._filesystem.loop)
            self._pending.add(future)
            return future


class _WebFolder:
    attempts = 4

    def __init__(self, backend: WebBackend, uri: SourceUri) -> None:
        self._backend = backend
        self._uri = uri
        self._authorization = ""
        if uri.userinfo:
            credentials = unquote(uri.userinfo).encode()
            self._authorization = f"Basic {base64.b64encode(credentials).decode()}"

    def stat(self, name: str) -> RemoteFile:
        # Not a HEAD, which signed addresses and some servers refuse.
        response = self._get(name, {"Range": "bytes=0-0"})
        try:
            size = _total(response.status, response.headers)
            version = _version(response.headers)
        finally:
            self._backend.close_response(response)
        if size is None:
            raise FailedPreconditionError(f"{self._what(name)} comes without its size")
        return RemoteFile(name, size, version)

    def read(self, file: RemoteFile, offset: int) -> Generator[bytes, None, None]:
        headers = {"Range": f"bytes={offset}-", "If-Range": file.version} if offset else {}
        response = self._get(file.name, headers)
        try:
            what = self._what(file.name)
            if _version(response.headers) != file.version or (
                _total(response.status, response.headers) not in (None, file.size)
            ):
                raise ChangedError(f"{what} was replaced during its download")
            skip = offset - _first(response.status, response.headers)
            if skip < 0 or response.status == 416:
                raise FailedPreconditionError(f"{what} was answered with another range than asked for")
            while chunk := self._backend.call(what, response.content.read, CHUNK_BYTES):
                # A server without ranges sends everything again.
                skipped = min(skip, len(chunk))
                skip -= skipped
                if skipped < len(chunk):
                    yield chunk[skipped:]
        finally:
            self._backend.close_response(response)

    def _get(self, name: str, headers: Mapping[str, str]) -> Any:
        what = self._what(name)
        headers = {"Accept-Encoding": "identity", **headers}
        response = self._backend.call(
            what, self._backend.get, self._uri.url(name), headers, self._authorization, what
        )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            self._backend.close_response(response)
            raise FailedPreconditionError(f"{what} comes compressed; the server asked for it uncompressed")
        return response

    def _what(self, name: str) -> str:
        return f"{name} of {str(self._uri)!r}"


def _total(status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of the whole file, None if the server does not say."""
    if status == 200:
        length = headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    return int(match[2]) if match else None


def _first(status: int, headers: Mapping[str, str]) -> int:
    """Offset of the first byte that is sent."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "")) if status == 206 else None
    return int(match[1] or 0) if match else 0


def _version(headers: Mapping[str, str]) -> str:
    """A validator that is exact enough to join two parts of a file."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
