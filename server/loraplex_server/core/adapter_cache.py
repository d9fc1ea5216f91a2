"""Folders of the adapters' cache on disk that both the API and the engine know.

The API writes the files of each upload to a new folder under `staging_folder`; the engine adopts it.
"""

from __future__ import annotations

import os
from pathlib import Path

STAGING = "staging"
"""Subfolder of the cache in which entries are prepared."""


def default_cache_dir() -> Path:
    """The default folder of the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "loraplex" / "adapters"


def staging_folder(cache_dir: Path | None) -> Path:
    """The folder for uploads. `cache_dir` is the operator's (--adapter-cache-dir), None for the default."""
    return (cache_dir or default_cache_dir()) / STAGING
