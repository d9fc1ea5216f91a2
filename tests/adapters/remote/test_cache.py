"""The cache of downloads across restarts, and against those who meddle with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraplex_server.adapters.remote.cache import DownloadCache
from loraplex_server.errors import FailedPreconditionError, ResourceExhaustedError


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
