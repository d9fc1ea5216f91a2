"""Files of one adapter's folder: opening those that may be read, and telling that one has changed.

Each file must lie under an allowed root after all symbolic links are followed. Only regular files are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.core.adapter_files import (
    BOTTLENECK_FILE,
    CONFIG_FILE,
    INTERFACE_FILE,
    TEXT_FILES,
    WEIGHTS_FILE,
)
from loraplex_server.core.errors import (
    FailedPreconditionError,
    PermissionDeniedError,
    Reason,
    UnavailableError,
)

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Identity, size and modification time of an adapter's files; differs once one of them was changed."""


def open_file(folder: Path, filename: str, roots: Iterable[Path]) -> tuple[BinaryIO, int]:
    """Opens a regular file of an adapter's folder for reading; returns it with its size in bytes.

    Raises:
        FailedPreconditionError: it is missing, or no regular file.
        PermissionDeniedError: a link leads out of the allowed roots, or the server may not read it.
        UnavailableError: the file system failed.
    """
    try:
        real = os.path.realpath(os.path.join(folder, filename), strict=True)
        if not is_inside(real, [os.path.realpath(root) for root in roots]):
            raise PermissionDeniedError(
                f"{filename} links to a place outside the allowed roots", reason=Reason.SOURCE_NOT_ALLOWED
            )
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise FailedPreconditionError(f"{filename} is missing") from error
    except PermissionError as error:
        raise PermissionDeniedError(
            f"{filename} may not be read by the server", reason=Reason.SOURCE_NOT_ALLOWED
        ) from error
    except (OSError, RuntimeError) as error:
        raise UnavailableError(f"{filename} cannot be opened: {error.__class__.__name__}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FailedPreconditionError(f"{filename} is not a regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def read_file(folder: Path, filename: str, roots: Iterable[Path], most: int) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises:
        MalformedFileError: it is longer.
        FailedPreconditionError, PermissionDeniedError, UnavailableError: as `open_file`.
    """
    file, size = open_file(folder, filename, roots)
    with file:
        if size > most:
            raise MalformedFileError(f"{filename} has {size} bytes; at most {most} are read")
        return file.read(most)


def stamp(folder: Path) -> Stamp:
    """The stamp of the adapter in `folder`; a missing file has None."""
    stamps: list[tuple[int, int, int] | None] = []
    for filename in (CONFIG_FILE, WEIGHTS_FILE, BOTTLENECK_FILE, INTERFACE_FILE, *TEXT_FILES):
        try:
            status = os.stat(folder / filename)
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def is_inside(path: str, roots: Iterable[str]) -> bool:
    """True if a real path is one of `roots`, real ones, or under it. Strings: thousands are registered."""
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
