"""The backend of a scheme: built in, registered in code, or declared by another package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from loraplex_server.adapters.origins.remote import registry
from loraplex_server.adapters.origins.remote.protocol import RemoteFile, RemoteFolder
from loraplex_server.adapters.origins.remote.registry import make_backend, register_backend
from loraplex_server.adapters.origins.resolver import AdapterSources
from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from loraplex_server.core.source_uri import AllowedSources, SourceUri

MakeSources = Callable[..., AdapterSources]


class Shelf:
    """A backend that serves a folder of this machine."""

    root: Path

    def __init__(self, allowed: AllowedSources) -> None:
        self.closed = False

    def open(self, uri: SourceUri) -> RemoteFolder:
        return ShelfFolder(self.root / uri.key(""))

    def close(self) -> None:
        self.closed = True


class ShelfFolder:
    attempts = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stat(self, name: str) -> RemoteFile:
        if not (self._folder / name).is_file():
            raise NotFoundError(f"{name} is not on the shelf")
        status = (self._folder / name).stat()
        return RemoteFile(name, status.st_size, str(status.st_mtime_ns))

    def read(self, file: RemoteFile, offset: int) -> Generator[bytes, None, None]:
        yield (self._folder / file.name).read_bytes()[offset:]


@pytest.fixture
def registered(adapter: Path) -> Iterator[None]:
    Shelf.root = adapter.parents[1]
    register_backend("shelf", Shelf)
    yield
    del registry._factories["shelf"]


@pytest.mark.usefixtures("registered")
def test_one_registered_in_code(
    make_sources: MakeSources, adapter: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    sources = make_sources("shelf://origin")
    assert content(sources.resolve("shelf://origin/sql")) == content(adapter)
    with pytest.raises(NotFoundError, match="'shelf://origin/nothing'") as caught:
        sources.resolve("shelf://origin/nothing")
    assert caught.value.info.resource == ("source", "shelf://origin/nothing")
    made = sources._backends["shelf"]
    sources.close()
    assert isinstance(made, Shelf)
    assert made.closed


def test_one_declared_by_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tmp_path / "elsewhere-1.0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text("[loraplex.adapter_backends]\nodd = elsewhere_odd:Odd\n")
    (tmp_path / "elsewhere_odd.py").write_text("class Odd:\n    def __init__(self, allowed): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(make_backend("odd", AllowedSources([]))).__name__ == "Odd"


def test_nobody_serves_it(make_sources: MakeSources) -> None:
    with pytest.raises(InvalidArgumentError, match="ftp"):
        make_sources("ftp://host/a")


@pytest.mark.parametrize(
    ("scheme", "library"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"), ("https", "aiohttp")]
)
def test_what_is_not_installed_is_named_with_its_extra(
    scheme: str, library: str, make_sources: MakeSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(FailedPreconditionError, match=rf"{library}.*'\.\[remote\]'"):
        make_sources(f"{scheme}://host/a")
