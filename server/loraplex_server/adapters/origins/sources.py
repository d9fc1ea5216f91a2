"""Folders of adapters: which files in them may be read.

A folder and each file in it must lie under an allowed root after all symbolic links are followed. Only
regular files are opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loraplex_server.adapters.files.folder import is_inside
from loraplex_server.core.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
)
from loraplex_server.core.text import quoted


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
        inside = [path for path in map(os.path.realpath, candidates) if is_inside(path, real_roots)]
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
            f"source {quoted(str(source))} is not a folder",
            resource=("source", str(source)),
            reason=Reason.SOURCE_NOT_FOUND,
        )
    return Path(found)
