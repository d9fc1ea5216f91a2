"""One remote file to disk: resumed after a break, never longer than announced, and verified."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TypeVar

from loraplex_server.adapters.origins.remote.protocol import ChangedError, RemoteFile, RemoteFolder
from loraplex_server.core.errors import (
    FailedPreconditionError,
    UnavailableError,
    disk_error,
)

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_READ_BYTES = 1 << 20
# A try that brought less than this counts as one that brought nothing.
_PROGRESS_BYTES = 64 << 10


class Downloader:
    """Downloads files until `stop` is set, which ends everything with UNAVAILABLE.

    Args:
        stop: set from another thread to end what is under way.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def attempt(self, work: Callable[[], T], attempts: int) -> T:
        """The result of `work`, tried again with growing pauses while it is UNAVAILABLE.

        Raises:
            ServerError: its last error, or its first of another kind.
        """
        for attempt in range(attempts):
            self._check_stop()
            try:
                return work()
            except ChangedError:
                raise
            except UnavailableError:
                if attempt == attempts - 1:
                    raise
                self._pause(attempt)
        raise AssertionError("attempts is at least 1")

    def download(self, folder: RemoteFolder, file: RemoteFile, path: Path, sha256: str) -> str:
        """Brings `path` to hold `file`, going on from what it holds already.

        Args:
            sha256: what the content must have, "" for whatever `file` says of itself.

        Returns:
            SHA-256 of the content, in hex.

        Raises:
            FailedPreconditionError: the content is not what was announced or pinned; `path` is gone.
            ChangedError: the remote file was replaced meanwhile; `path` is gone.
            ResourceExhaustedError: the disk is full.
            UnavailableError: it broke off too often without getting on; `path` keeps what it has.
        """
        resumed = self._transfer(folder, file, path)
        try:
            return _verify(file, path, sha256)
        except FailedPreconditionError:
            path.unlink()
            if not resumed:
                raise
        # What an earlier download has left may be to blame: once more, from nothing.
        return self.download(folder, file, path, sha256)

    def _transfer(self, folder: RemoteFolder, file: RemoteFile, path: Path) -> bool:
        """Fills `path` up to the file's size; whether it began with what was there before."""
        if not file.version or (path.exists() and path.stat().st_size > file.size):
            path.unlink(missing_ok=True)
        resumed = path.exists() and path.stat().st_size > 0
        fruitless = 0
        while True:
            self._check_stop()
            begin = path.stat().st_size if path.exists() else 0
            try:
                self._append(folder, file, path, begin)
                return resumed
            except ChangedError:
                path.unlink(missing_ok=True)
                raise
            except UnavailableError:
                gained = path.stat().st_size - begin
                if not file.version:
                    path.unlink()
                    gained = 0
                fruitless = 0 if gained >= _PROGRESS_BYTES else fruitless + 1
                if fruitless >= folder.attempts:
                    raise
                self._pause(fruitless)

    def _append(self, folder: RemoteFolder, file: RemoteFile, path: Path, begin: int) -> None:
        """One try: appends to `path` from `begin` on."""
        received = begin
        # Without a buffer, whose rest would meet a full disk only when it is closed.
        with path.open("ab", buffering=0) as out:
            if received == file.size:
                return
            with contextlib.closing(folder.read(file, begin)) as chunks:
                for chunk in chunks:
                    self._check_stop()
                    received += len(chunk)
                    if received > file.size:
                        raise ChangedError(f"{file.name} is longer than the {file.size} bytes announced")
                    try:
                        _write(out, chunk)
                    except OSError as error:
                        raise disk_error("--adapter-cache-dir", error) from error
        if received < file.size:
            raise UnavailableError(f"{file.name} broke off after {received} of {file.size} bytes")

    def _pause(self, attempt: int) -> None:
        """Waits longer each time, and not as long as everybody else."""
        longest_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
        self._stop.wait(longest_s * random.uniform(0.5, 1.0))

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise UnavailableError("the server stops")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return _digest(path, hashlib.sha256())


def _verify(file: RemoteFile, path: Path, sha256: str) -> str:
    """The SHA-256 of the file on disk; FailedPreconditionError if it has not the digests it should have."""
    found = sha256_of(path)
    for expected, whose in ((sha256, "asked for"), (file.sha256, "announced")):
        if expected not in ("", found):
            raise FailedPreconditionError(f"{file.name} has SHA-256 {found}, and {expected} was {whose}")
    if file.git_sha1:
        git_sha1 = _digest(path, hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False))
        if git_sha1 != file.git_sha1:
            raise FailedPreconditionError(
                f"{file.name} has the git object id {git_sha1}, and {file.git_sha1} was announced"
            )
    return found


def _write(out: FileIO, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[out.write(left) :]


def _digest(path: Path, state: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            state.update(chunk)
    return state.hexdigest()
