"""Folders of the adapters' cache on disk that both the API and the engine know.

The API writes the files of each upload to a new folder under `staging_folder`; the engine adopts that folder.
"""

from __future__ import annotations

import os
from pathlib import Path

STAGING = "staging"
"""Subfolder of the cache, for entries that are not complete yet."""


def default_cache_dir() -> Path:
    """The default folder of the cache: `loraplex/adapters` in `$XDG_CACHE_HOME`, or else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "loraplex" / "adapters"


def cache_folder(chosen: Path | None) -> Path:
    """The cache's folder, as one absolute path for API and engine.

    Args:
        chosen: the operator's choice (--adapter-cache-dir); None is the default folder.
    """
    return (chosen or default_cache_dir()).expanduser().resolve()


def staging_folder(chosen: Path | None) -> Path:
    """The folder for uploads in progress; `chosen` as for `cache_folder`."""
    return cache_folder(chosen) / STAGING
