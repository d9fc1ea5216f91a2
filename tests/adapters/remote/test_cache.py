"""The cache of downloads across restarts, and against those who meddle with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex_server.adapters.origins.remote.cache import DownloadCache
from loraplex_server.adapters.origins.remote.download import Downloader
from loraplex_server.adapters.origins.remote.protocol import RemoteFile
from loraplex_server.core.errors import FailedPreconditionError, Reason, ResourceExhaustedError


def fill(cache: DownloadCache, key: str, num_bytes: int) -> Path:
    folder = cache.begin(key, num_bytes)
    (folder / "f").write_bytes(b"x" * num_bytes)
    return cache.commit(key, {})


def size(cache: DownloadCache, folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_one_server_owns_a_folder(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path / "cache", 1000)
    with pytest.raises(FailedPreconditionError, match="--adapter-cache-dir"):
        DownloadCache(tmp_path / "cache", 1000)
    cache.close()
    DownloadCache(tmp_path / "cache", 1000).close()
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match="--adapter-cache-dir"):
        DownloadCache(tmp_path / "file", 1000)


def test_a_restart_keeps_what_is_whole_in_its_order(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, 10_000)
    for key in "abcd":
        cache.release(fill(cache, key, 1000))
    half = cache.begin("e", 1000)
    (half / "f").write_bytes(b"x" * 10)
    cache.end("e")
    cache.close()
    (tmp_path / "entries" / "c" / "f").write_bytes(b"short")
    (tmp_path / "entries" / "d" / "source.json").unlink()
    (tmp_path / "removed" / "old").mkdir()
    for age, name in enumerate(("entries/b", "partial/e", "entries/a")):
        os.utime(tmp_path / name, (age + 1, age + 1))

    again = DownloadCache(tmp_path, 3500)
    assert again.used_bytes == sum(
        size(again, folder) for folder in (tmp_path / "entries" / "a", tmp_path / "entries" / "b", half)
    )
    assert again.lookup("c") is again.lookup("d") is None
    assert list((tmp_path / "removed").iterdir()) == []
    fill(again, "x", 1900)
    assert again.lookup("b") is None, "least recently used goes first"
    folder = again.lookup("a")
    assert folder is not None
    assert (folder / "f").stat().st_size == 1000
    again.close()


def test_what_is_held_or_under_way_stays(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, 3000)
    held = fill(cache, "held", 1000)
    cache.retain(held)
    cache.release(held)
    under_way = cache.begin("half", 1000)
    (under_way / "f").write_bytes(b"x" * 500)
    with pytest.raises(ResourceExhaustedError):
        cache.begin("more", 1500)
    assert held.is_dir()
    assert (under_way / "f").stat().st_size == 500
    cache.end("half")
    cache.release(held)
    fill(cache, "more", 2500)
    assert not held.exists()
    assert not under_way.exists()
    assert cache.used_bytes <= 3000
    other = tmp_path / "elsewhere"
    cache.retain(other)
    cache.release(other)
    cache.close()


def test_nothing_is_seen_before_it_is_whole(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, 3000)
    folder = cache.begin("a", 1000)
    (folder / "f").write_bytes(b"x" * 999)
    assert cache.lookup("a") is None
    assert list(cache.entries_folder.iterdir()) == []
    cache.end("a")
    assert cache.begin("a", 1000) == folder
    assert (folder / "f").stat().st_size == 999, "it goes on with what there is"
    cache.commit("a", {})
    assert cache.lookup("a") == cache.entries_folder / "a"
    cache.close()


def test_a_disk_that_is_full_before_the_budget_is(tmp_path: Path) -> None:
    cache = DownloadCache(tmp_path, 10_000)
    held = fill(cache, "held", 1000)
    cache.release(fill(cache, "idle", 1000))
    for key, keep in (("kept", True), ("dropped", False)):
        (cache.begin(key, 1000) / "f").write_bytes(b"x" * 10)
        cache.end(key, keep=keep)
    assert {path.name for path in (tmp_path / "partial").iterdir()} == {"kept"}
    under_way = cache.begin("under way", 1000)
    cache.empty()
    assert list((tmp_path / "entries").iterdir()) == [held]
    assert list((tmp_path / "partial").iterdir()) == [under_way]
    assert cache.lookup("idle") is None
    cache.close()


@pytest.mark.parametrize("num_bytes", [10, 100_000])
def test_a_download_to_a_full_disk_says_so(tmp_path: Path, num_bytes: int) -> None:
    class Folder:
        attempts = 3

        def read(self, file: RemoteFile, offset: int) -> Iterator[bytes]:
            yield b"x" * num_bytes

    path = tmp_path / "f"
    path.symlink_to("/dev/full")
    downloader = Downloader(threading.Event())
    with pytest.raises(ResourceExhaustedError, match="--adapter-cache-dir is full") as caught:
        downloader.download(Folder(), RemoteFile("f", num_bytes, "1"), path, "")
    assert caught.value.info.reason == Reason.DISK_FULL
