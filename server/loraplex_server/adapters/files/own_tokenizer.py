"""The tokenizer that an adapter brings, as the files that make it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loraplex_server.adapters.files.folder import open_file
from loraplex_server.core.adapter_files import SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from loraplex_server.core.tokenizer_source import TokenizerFile, TokenizerSource

_ADDED_TOKENS_FILE = "added_tokens.json"
_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)


def find_tokenizer(folder: Path, roots: Iterable[Path]) -> TokenizerSource | None:
    """The tokenizer in an adapter's folder; None where there is none. Nothing of it is read here.

    Tokens that were added to one that was not saved as `tokenizer.json` count, so that they are missed.

    Raises:
        FailedPreconditionError, PermissionDeniedError, UnavailableError: as `open_file`.
    """
    if not any((folder / name).exists() for name in (TOKENIZER_FILE, _ADDED_TOKENS_FILE)):
        return None
    roots = tuple(roots)
    found = (name for name in _FILES if (folder / name).exists())
    return TokenizerSource(str(folder), tuple(_identity(folder, name, roots) for name in found))


def _identity(folder: Path, name: str, roots: tuple[Path, ...]) -> TokenizerFile:
    file, _ = open_file(folder, name, roots)
    with file:
        status = os.fstat(file.fileno())
    return TokenizerFile(name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
