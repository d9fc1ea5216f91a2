"""Keeps an eye on folders of adapters: which came, went, or were changed.

A folder counts once two looks in a row see it alike, so that one that is still being copied is left alone. A
watched folder that cannot be listed, because its disk is away for a moment, tells nothing: its adapters stay.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from loraplex_server.adapters.files.folder import Stamp, stamp
from loraplex_server.core.adapter_files import CONFIG_FILE

_log = logging.getLogger(__name__)


class ChangeKind(enum.Enum):
    """Kinds of changes of an adapter's folder."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the adapter in `folder`, whose last part is its name."""

    kind: ChangeKind
    folder: Path


class FolderScan:
    """Compares what folders hold with what they held. What is there at the beginning is known already."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = [folder.absolute() for folder in folders]
        self._known: dict[Path, Stamp] = {}
        for folder in self._folders:
            self._known.update(_look(folder) or {})
        self._seen = dict(self._known)
        self._away: set[Path] = set()

    def poll(self) -> list[Change]:
        """Changes since the last call, by path. Blocks on the file system."""
        seen: dict[Path, Stamp] = {}
        for folder in self._folders:
            found = _look(folder)
            if found is None:
                if folder not in self._away:
                    _log.warning("%s cannot be listed; its adapters stay as they are", folder)
                self._away.add(folder)
                found = {path: before for path, before in self._seen.items() if path.parent == folder}
            else:
                self._away.discard(folder)
            seen.update(found)
        before, self._seen = self._seen, seen
        changes = []
        for path in sorted(seen.keys() | before.keys() | self._known.keys()):
            now, known = seen.get(path), self._known.get(path)
            if now != before.get(path) or now == known:
                continue
            if now is None:
                kind = ChangeKind.REMOVED
                del self._known[path]
            else:
                kind = ChangeKind.ADDED if known is None else ChangeKind.CHANGED
                self._known[path] = now
            changes.append(Change(kind, path))
        return changes


class FolderWatch:
    """Polls folders on a thread of its own.

    Args:
        interval_s: seconds between two looks.
        report: takes each change; called from that thread.
    """

    def __init__(self, folders: Iterable[Path], interval_s: float, report: Callable[[Change], None]) -> None:
        # Before anybody registers what is there: whatever comes later is then seen as new.
        self._scan = FolderScan(folders)
        self._interval_s = interval_s
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adapter-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for change in self._scan.poll():
                self._report(change)


def _look(folder: Path) -> dict[Path, Stamp] | None:
    """The adapters in a folder, None if it cannot be listed."""
    try:
        return {path: stamp(path) for path in folder.iterdir() if (path / CONFIG_FILE).is_file()}
    except OSError:
        return None
