"""Object stores: S3 as moto speaks it, Google's and Azure's interfaces from small servers of our own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

from loraplex_server.adapters.origins.remote import cloud, protocol
from loraplex_server.adapters.origins.remote.cloud import CloudBackend
from loraplex_server.adapters.origins.resolver import AdapterSources
from loraplex_server.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from loraplex_server.core.source_uri import parse_uri

WEIGHTS = "adapter_model.safetensors"
MakeSources = Callable[..., AdapterSources]
Content = Callable[[Path], dict[str, bytes]]
pytest.importorskip("s3fs")  # of the extra `remote`
pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture
def bucket(s3_server: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3_server.put({f"bucket/team/sql/{path.name}": path.read_bytes() for path in adapter.iterdir()})
    return "s3://bucket"


def test_s3(
    bucket: str,
    s3_server: Any,
    make_sources: MakeSources,
    adapter: Path,
    content: Content,
    monkeypatch: pytest.MonkeyPatch,
    write_adapter: Any,
) -> None:
    monkeypatch.setattr(cloud, "CHUNK_BYTES", 10_000)
    sources = make_sources(f"{bucket}/team/")
    digest = hashlib.sha256(content(adapter)[WEIGHTS]).hexdigest()
    folder = sources.resolve(f"{bucket}/team/sql#sha256={digest}")
    assert content(folder) == content(adapter)
    assert sources.resolve(f"{bucket}/team/sql") == folder
    with pytest.raises(FailedPreconditionError, match="SHA-256"):
        sources.resolve(f"{bucket}/team/sql#sha256={'0' * 64}")
    with pytest.raises(NotFoundError, match="s3://bucket/team/nothing"):
        sources.resolve(f"{bucket}/team/nothing")
    with pytest.raises(PermissionDeniedError):
        sources.resolve(f"{bucket}/other")
    new = write_adapter(adapter.parent / "new", seed=4)
    s3_server.put({f"bucket/team/sql/{path.name}": path.read_bytes() for path in new.iterdir()})
    assert content(sources.resolve(f"{bucket}/team/sql")) == content(adapter.parent / "new")


def test_s3_objects_that_are_replaced_meanwhile_are_not_mixed(
    bucket: str, s3_server: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "CHUNK_BYTES", 10_000)
    folder = CloudBackend("s3").open(parse_uri(f"{bucket}/team/sql"))
    file = folder.stat(WEIGHTS)
    chunks = folder.read(file, 5)
    assert next(chunks) == (adapter / WEIGHTS).read_bytes()[5:10_005]
    s3_server.put({f"bucket/team/sql/{WEIGHTS}": bytes(file.size)})
    with pytest.raises(protocol.ChangedError):
        list(chunks)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("x"), NotFoundError),
        (PermissionError("x"), PermissionDeniedError),
        (OSError("Forbidden: https://x"), PermissionDeniedError),
        (type("NoCredentialsError", (Exception,), {})(), PermissionDeniedError),
        (type("HttpResponseError", (Exception,), {"status_code": 403})(), PermissionDeniedError),
        (type("HttpError", (Exception,), {"code": "503"})(), UnavailableError),
        (OSError(22, "InvalidBucketName"), FailedPreconditionError),
        (ConnectionResetError(), UnavailableError),
    ],
)
def test_the_libraries_errors(error: Exception, expected: type[Exception]) -> None:
    typed = cloud._typed(error, "f of 's3://bucket/a'")
    assert type(typed) is expected
    assert "s3://bucket/a" in str(typed)


class GoogleObjects(dict[str, bytes]):
    """A web place's files, seen through the paths of Google's JSON interface."""

    def get(self, path: str, default: Any = None) -> Any:
        name, _, query = unquote(path).partition("?")
        prefix = "/storage/v1/b/bucket/o/"
        if name.startswith("/download" + prefix):
            return super().get(name.removeprefix("/download" + prefix), default)
        found = super().get(name.removeprefix(prefix))
        if not name.startswith(prefix):
            return b'{"items": [], "kind": "storage#objects"}' if name + "/" == prefix else default
        if found is None or "alt=media" in query:
            return found
        return (
            f'{{"kind": "storage#object", "name": "{name.removeprefix(prefix)}", "bucket": "bucket", '
            f'"size": "{len(found)}", "etag": "{hashlib.md5(found).hexdigest()}", "generation": "1"}}'
        ).encode()


def test_google(
    place: Any, adapter: Path, make_sources: MakeSources, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", place.url)
    place.files = GoogleObjects({f"team/sql/{name}": body for name, body in content(adapter).items()})
    sources = make_sources("gs://bucket/team")
    assert content(sources.resolve("gs://bucket/team/sql")) == content(adapter)
    with pytest.raises(NotFoundError, match="gs://bucket/team/nothing"):
        sources.resolve("gs://bucket/team/nothing")


class _Blobs(BaseHTTPRequestHandler):
    """Properties, ranges and empty listings, as Azure's blob service answers them."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.files.get(path)
        if "comp=list" in query:
            text = b"<EnumerationResults><Blobs/><NextMarker/></EnumerationResults>"
            return self.answer(200, text, Content_Type="application/xml")
        if body is None:
            return self.answer(404, b"", x_ms_error_code="BlobNotFound")
        headers = {
            "ETag": f'"{hashlib.md5(body).hexdigest()}"',
            "Last-Modified": "Sat, 21 Nov 2026 00:00:00 GMT",
            "x-ms-blob-type": "BlockBlob",
        }
        span = self.headers.get("x-ms-range")
        if self.command == "HEAD" or span is None:
            return self.answer(200, body, **headers)
        begin, end = map(int, span.removeprefix("bytes=").split("-"))
        part = body[begin : end + 1]
        shown = f"bytes {begin}-{begin + len(part) - 1}/{len(body)}"
        return self.answer(206, part, **headers, Content_Range=shown)

    do_HEAD = do_GET  # noqa: N815


def test_azure(
    adapter: Path, make_sources: MakeSources, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "CHUNK_BYTES", 10_000)
    files = {f"/me/container/team/sql/{name}": body for name, body in content(adapter).items()}
    monkeypatch.setattr(_Blobs, "files", files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Blobs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"AccountName=me;AccountKey=a2V5;BlobEndpoint=http://127.0.0.1:{server.server_port}/me",
    )
    try:
        sources = make_sources("az://container/team")
        assert content(sources.resolve("az://container/team/sql")) == content(adapter)
        with pytest.raises(NotFoundError, match="az://container/team/nothing"):
            sources.resolve("az://container/team/nothing")
        sources.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_azure_without_an_account_says_so(make_sources: MakeSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    sources = make_sources("az://container")
    with pytest.raises(FailedPreconditionError, match="az://container/a"):
        sources.resolve("az://container/a")
