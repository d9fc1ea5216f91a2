"""Folders of adapters: which files in them may be read.

A folder and each file in it must lie under an allowed root after all symbolic links are followed. Only
regular files are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from loraplex_server.core.adapter_files import (
    BOTTLENECK_FILE,
    CONFIG_FILE,
    INTERFACE_FILE,
    PICKLE_FILES,
    TEXT_FILES,
    WEIGHTS_FILE,
)
from loraplex_server.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    UnavailableError,
)
from loraplex_server.core.text import quoted

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Identity, size and modification time of an adapter's files; differs once one of them was changed."""


def resolve_folder(source: str | Path, roots: Iterable[Path]) -> Path:
    """The real folder that `source` names: absolute, or relative to one of `roots`.

    Raises:
        InvalidArgumentError: `source` cannot be a path.
        PermissionDeniedError: it does not lie under one of `roots`, whether it exists or not.
        NotFoundError: there is no such folder.
    """
    real_roots = [os.path.realpath(root) for root in roots]
    try:
        absolute = os.path.isabs(source)
        candidates = [source] if absolute else [os.path.join(root, source) for root in real_roots]
        inside = [path for path in map(os.path.realpath, candidates) if _is_inside(path, real_roots)]
        found = next((path for path in inside if os.path.isdir(path)), None)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError.field("source", f"{quoted(str(source))} cannot be a path") from error
    if not str(source) or not inside:
        raise PermissionDeniedError(
            f"source {quoted(str(source))} is not under an allowed root (--adapter-root)",
            resource=("source", str(source)),
            reason=Reason.SOURCE_NOT_ALLOWED,
        )
    if found is None:
        raise NotFoundError(
            f"source {quoted(str(source))} is no folder",
            resource=("source", str(source)),
            reason=Reason.SOURCE_NOT_FOUND,
        )
    return Path(found)


def open_file(folder: Path, filename: str, roots: Iterable[Path]) -> tuple[BinaryIO, int]:
    """Opens a regular file of an adapter's folder for reading; returns it with its size in bytes.

    Raises:
        FailedPreconditionError: it is missing, or no regular file.
        PermissionDeniedError: a link leads out of the allowed roots, or the server may not read it.
        UnavailableError: the file system failed.
    """
    try:
        real = os.path.realpath(os.path.join(folder, filename), strict=True)
        if not _is_inside(real, [os.path.realpath(root) for root in roots]):
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
        raise FailedPreconditionError(f"{filename} is no regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def pickle_refusal(name: str) -> str:
    """Why one of `PICKLE_FILES` is not read."""
    return (
        f"{name} is a pickle, which can run code when it is read; re-save the adapter as safetensors "
        f"({PICKLE_FILES[name]})"
    )


def head_refusal(name: str) -> str:
    """Why an adapter with one of `HEAD_FILES` beside it is not served."""
    return (
        f"{name} is a head of its own, which is not served; save the adapter with with_head=False, or take "
        "the file away if it is the base's head"
    )


def _is_inside(path: str, roots: Iterable[str]) -> bool:
    """Whether a real path is one of `roots`, real ones, or under it. Strings: thousands are registered."""
    return any(path == root or path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


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
