"""Folders of the adapters' cache on disk that both the API and the engine know.

The API writes the files of an upload to a folder of its own under `staging_folder`; the engine adopts it.
"""

from __future__ import annotations

import os
from pathlib import Path

STAGING = "staging"
"""Folder in the cache's in which entries may be prepared."""


def default_cache_dir() -> Path:
    """The cache's folder unless the operator says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "loraplex" / "adapters"


def staging_folder(cache_dir: Path | None) -> Path:
    """The folder for what is received; `cache_dir` is the operator's (--adapter-cache-dir)."""
    return (cache_dir or default_cache_dir()) / STAGING
