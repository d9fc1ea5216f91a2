"""Contents of files, read again when they change: certificates and tokens are renewed under way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0

T = TypeVar("T")


class _Stamp(NamedTuple):
    """A file's version."""

    mtime_ns: int
    size: int
    inode: int


class Reloaded(Generic[T]):
    """A value made of some files. Any thread may ask for it.

    Files that have changed into something that cannot be read leave the last good value in place, and the log
    says so: a renewal that is half written, or wrong, must not shut everyone out.

    Args:
        paths: whose change (time, size or inode) makes the value stale; looked at once a second at most.
        read: makes the value; raises ValueError or OSError for what cannot be served.

    Raises:
        ValueError, OSError: the files cannot be served at all; from `read`.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], T], *, look_every_s: float = _LOOK_EVERY_S
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._look_every_s = look_every_s
        self._lock = threading.Lock()
        # Before the reading: a change in between is then seen as one.
        self._stamp = self._look()
        self._looked_s = time.monotonic()
        self._value = read()

    def get(self) -> T:
        """The value of the files as they are now, or as they last were good."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s >= self._look_every_s:
                self._looked_s = now_s
                self._refresh()
            return self._value

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        names = ", ".join(str(path) for path in self._paths)
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            _log.warning("%s changed and cannot be used; the last good one stays: %s", names, error)
        else:
            _log.info("%s changed and was read again", names)

    def _look(self) -> tuple[_Stamp | None, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_mtime_ns, found.st_size, found.st_ino)
