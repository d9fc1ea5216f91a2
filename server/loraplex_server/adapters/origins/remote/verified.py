"""The cache's entries as adapters are read from them: checked before each use, and made one at a time."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from loraplex_server.adapters.origins.remote.cache import DownloadCache
from loraplex_server.adapters.origins.remote.download import sha256_of
from loraplex_server.core.errors import FailedPreconditionError, InternalError

_log = logging.getLogger(__name__)


class VerifiedCache:
    """Entries of a cache by key. Methods may be called from any thread, and block.

    Attributes:
        files: the cache itself.
    """

    def __init__(self, files: DownloadCache) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._entry_locks: dict[str, tuple[threading.Lock, int]] = {}

    def intact(self, key: str, source: str) -> Path | None:
        """A complete entry whose files are still what they were, held; None if there is none.

        Args:
            source: for the log.

        Raises:
            FailedPreconditionError: it is in use, but was changed on disk.
        """
        folder = self.files.lookup(key)
        if folder is None:
            return None
        digests: dict[str, str] = self.files.record(folder)["sha256"]
        if all(sha256_of(folder / name) == digest for name, digest in digests.items()):
            return folder
        _log.warning("the downloaded copy of %s was changed on disk", source)
        if self.files.discard(folder):
            return None
        raise FailedPreconditionError(
            "its downloaded copy was changed on disk; unload what was loaded from it, then load it anew"
        )

    def land(self, key: str, staged: Path, source: str) -> Path:
        """Keeps the files of a staged folder under `key`, held until they are released.

        Raises:
            FailedPreconditionError, ResourceExhaustedError: there is no room for it in the cache.
        """
        cache = self.files
        if staged.parent != cache.staging_folder:
            raise InternalError(f"{staged} was not staged")
        with self.locked(key):
            folder = self.intact(key, source)
            if folder is not None:
                return folder
            files = sorted(staged.iterdir())
            digests = {file.name: sha256_of(file) for file in files}
            partial = cache.begin(key, sum(file.stat().st_size for file in files))
            committed = False
            try:
                for file in files:
                    file.replace(partial / file.name)
                folder = cache.commit(key, {"source": source, "sha256": digests})
                committed = True
            finally:
                if not committed:
                    cache.end(key, keep=False)
        return folder

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Keeps two spellings of one source, differing in credentials say, from one partial download."""
        with self._lock:
            lock, users = self._entry_locks.get(key, (threading.Lock(), 0))
            self._entry_locks[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._entry_locks.pop(key)
                if users > 1:
                    self._entry_locks[key] = lock, users - 1
