"""Object stores: S3 as moto speaks it, Google's JSON interface from a small server of our own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from loraplex_server.adapters.remote import backend, cloud
from loraplex_server.adapters.remote.cloud import CloudBackend
from loraplex_server.adapters.remote.uri import parse_uri
from loraplex_server.adapters.resolver import AdapterSources
from loraplex_server.errors import (
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)

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
    with pytest.raises(backend.ChangedError):
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


def test_azure_without_an_account_says_so(make_sources: MakeSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    sources = make_sources("az://container")
    with pytest.raises(FailedPreconditionError, match="az://container/a"):
        sources.resolve("az://container/a")
