"""Downloaded adapters on disk, within a budget of bytes.

    entries/<key>/   complete: appears by one rename, and never changes afterwards
    partial/<key>/   what a download has so far, kept when it breaks off
    staging/<any>/   prepared here to become an entry: uploads, compositions; nothing of it outlives a server
    removed/         on its way out

The key stands for the source and the versions of its files, so another version is another entry. What a
registered adapter is read from (`retain` … `release`) and what is being downloaded (`begin` … `end`) stays;
of the rest, the least recently used goes first. One server owns a folder at a time.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex_server.core.adapter_cache import STAGING
from loraplex_server.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    disk_error,
)

_RECORD = "source.json"
_RETRY_S = 5.0
"""Told to a client that finds the cache full: a download may end by then, or an adapter go."""


@dataclasses.dataclass(eq=False)
class _Item:
    """An entry or a partial download. `used` orders by last use; `holders` keep it."""

    path: Path
    num_bytes: int
    used: int
    holders: int = 0


class DownloadCache:
    """The cache in `folder`; methods may be called from any thread.

    Args:
        budget: bytes that entries and partial downloads may take together.

    Raises:
        FailedPreconditionError: another server uses the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._budget = budget
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = folder = folder.resolve()
            self._lock_file = (folder / "lock").open("w")
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in ("removed", STAGING):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("entries", "partial", "removed", STAGING):
                (folder / name).mkdir(exist_ok=True)
            self._entries = self._scan(self.entries_folder)
            self._partial = self._scan(folder / "partial")
        except BlockingIOError as error:
            self._lock_file.close()
            raise FailedPreconditionError(
                f"another server uses {str(folder)!r}; give each its own --adapter-cache-dir"
            ) from error
        except OSError as error:
            raise FailedPreconditionError(
                f"{str(folder)!r} cannot hold downloads ({error.strerror}); "
                "choose another --adapter-cache-dir"
            ) from error

    @property
    def entries_folder(self) -> Path:
        """Real path of the folder in which each complete entry is a folder."""
        return self._folder / "entries"

    @property
    def staging_folder(self) -> Path:
        """On the same file system as the entries; does not count as used."""
        return self._folder / STAGING

    @property
    def used_bytes(self) -> int:
        """Bytes of entries and partial downloads, those still to be downloaded included."""
        with self._lock:
            return self._used()

    def lookup(self, key: str) -> Path | None:
        """The complete entry of this key, held until `release`; None if there is none."""
        with self._lock:
            return self._hold(key)

    def retain(self, folder: Path) -> None:
        """Holds the entry that `folder` is once more; any other folder is left alone.

        Raises:
            NotFoundError: it was an entry, and is gone.
        """
        if folder.parent != self.entries_folder:
            return
        with self._lock:
            if self._hold(folder.name) is None:
                raise NotFoundError(
                    "its downloaded copy is gone; unload it and load it from its source again",
                    resource=("source", str(folder)),
                )

    def record(self, folder: Path) -> Mapping[str, Any]:
        """The record that `commit` was given for an entry that is held."""
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        return record

    def discard(self, folder: Path) -> bool:
        """Removes an entry that the caller alone holds; False, and it is let go, if others hold it too."""
        with self._lock:
            item = self._entries[folder.name]
            item.holders -= 1
            if item.holders:
                return False
            self._remove(self._entries, folder.name)
            return True

    def release(self, folder: Path) -> None:
        """Lets go of what `lookup`, `commit` or `retain` held; any other folder is left alone."""
        if folder.parent != self.entries_folder:
            return
        with self._lock:
            item = self._entries.get(folder.name)
            if item is not None and item.holders:
                item.holders -= 1
                self._touch(item)

    def begin(self, key: str, num_bytes: int) -> Path:
        """The folder to download into, with room for `num_bytes` in all; held until `end` or `commit`.

        It may hold what an earlier download of the same key has left.

        Raises:
            FailedPreconditionError: it is more than the whole budget, or its entry is in use but broken.
            ResourceExhaustedError: what is in use leaves too little room.
        """
        if num_bytes > self._budget:
            raise FailedPreconditionError(
                f"its {num_bytes} bytes do not fit the cache of {self._budget} (--adapter-cache-bytes)"
            )
        with self._lock:
            if key in self._entries:
                raise FailedPreconditionError(
                    "its downloaded copy was changed on disk; unload what was loaded from it, "
                    "then load it anew"
                )
            path = self._folder / "partial" / key
            item = self._partial.setdefault(key, _Item(path, 0, 0))
            item.holders += 1
            before, item.num_bytes = item.num_bytes, num_bytes
            self._touch(item)
            self._evict()
            if self._used() > self._budget:
                item.num_bytes, item.holders = before, item.holders - 1
                in_use = sum(entry.num_bytes for entry in self._entries.values() if entry.holders)
                raise ResourceExhaustedError(
                    f"there is no room to download {num_bytes} bytes: of the cache's {self._budget} "
                    f"(--adapter-cache-bytes), registered adapters take {in_use} and downloads the rest; "
                    "unload some, or try again",
                    resource=("disk", "--adapter-cache-bytes"),
                    retry_after_s=_RETRY_S,
                    reason=Reason.CACHE_FULL,
                )
            path.mkdir(exist_ok=True)
            return path

    def end(self, key: str, *, keep: bool = True) -> None:
        """Ends a download that was not committed.

        Args:
            keep: what it has, as far as there is room.
        """
        with self._lock:
            item = self._partial[key]
            item.holders -= 1
            item.num_bytes = _folder_bytes(item.path)
            if not (item.num_bytes and keep):
                self._remove(self._partial, key)

    def empty(self) -> None:
        """Removes all that nobody holds: the disk is full before the budget is."""
        with self._lock:
            for items in (self._entries, self._partial):
                for key in [key for key, item in items.items() if not item.holders]:
                    self._remove(items, key)

    def commit(self, key: str, record: Mapping[str, Any]) -> Path:
        """Makes a download an entry, held until `release`.

        Args:
            record: what is to be known of it, for people.

        Raises:
            ServerError: the disk is full or failed; the download is still `begin`'s.
        """
        with self._lock:
            item = self._partial[key]
            try:
                sizes = {path.name: path.stat().st_size for path in item.path.iterdir()}
                with (item.path / _RECORD).open("w") as file:
                    json.dump({**record, "bytes": sizes}, file, indent=1)
                for path in item.path.iterdir():
                    _sync_to_disk(path)
                _sync_to_disk(item.path)
                item.path.rename(self.entries_folder / key)
                _sync_to_disk(self.entries_folder)
            except OSError as error:
                raise disk_error("--adapter-cache-dir", error) from error
            del self._partial[key]
            path = self.entries_folder / key
            self._entries[key] = _Item(path, _folder_bytes(path), next(self._clock), holders=1)
            return path

    def close(self) -> None:
        """Gives the folder back; nothing may be called afterwards."""
        self._lock_file.close()

    def _scan(self, folder: Path) -> dict[str, _Item]:
        """The entries that an earlier server has left, by last use; broken ones are removed."""
        found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        items = {path.name: _Item(path, _folder_bytes(path), next(self._clock)) for path in found}
        if folder == self.entries_folder:
            for key in [key for key, item in items.items() if not _is_whole(item.path)]:
                self._remove(items, key)
        return items

    def _hold(self, key: str) -> Path | None:
        item = self._entries.get(key)
        if item is None:
            return None
        if not _is_whole(item.path):
            # Somebody else removed or changed its files.
            if not item.holders:
                self._remove(self._entries, key)
            return None
        item.holders += 1
        self._touch(item)
        return item.path

    def _touch(self, item: _Item) -> None:
        item.used = next(self._clock)
        try:
            os.utime(item.path)
        except OSError:
            # The order of eviction after a restart is all that suffers.
            return

    def _used(self) -> int:
        return sum(item.num_bytes for item in [*self._entries.values(), *self._partial.values()])

    def _evict(self) -> None:
        while self._used() > self._budget:
            unused = [
                (item.used, items, key)
                for items in (self._entries, self._partial)
                for key, item in items.items()
                if not item.holders
            ]
            if not unused:
                return
            _, items, key = min(unused, key=lambda found: found[0])
            self._remove(items, key)

    def _remove(self, items: dict[str, _Item], key: str) -> None:
        """Removes by a rename first, so that no half of an entry is ever seen under its name."""
        item = items.pop(key)
        grave = self._folder / "removed" / f"{key}.{next(self._clock)}"
        try:
            item.path.rename(grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)


def entry_key(*parts: str) -> str:
    """A name for the entry that `parts` identify."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _RECORD).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _folder_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
