"""Whole tables of the vocabulary in an adapter's file, in blocks of rows, and compared with the base's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraplex_server.adapters.files.folder import open_file
from loraplex_server.adapters.files.tensor_file import ITEM_BYTES, decode
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.adapters.spec.sites import Entry
from loraplex_server.adapters.spec.tensors import TensorInfo
from loraplex_server.core.adapter_files import WEIGHTS_FILE
from loraplex_server.core.frozen_base import Array, FrozenBase

BLOCK_BYTES = 8 << 20
"""Of a table, about so much is decoded at once."""


def changed_tokens(
    folder: Path, roots: Iterable[Path], base: FrozenBase | None, entry: Entry, table: TensorInfo
) -> Sequence[int]:
    """Tokens, ascending, whose rows are not the base's; all of them where that is most, or without a base.

    Raises:
        MalformedFileError: the file ends before its header says.
        PermissionDeniedError, UnavailableError: as for `open_file`.
    """
    rows = table.shape[0]
    if base is None:
        return range(rows)
    found: list[int] = []
    file, _ = open_file(folder, WEIGHTS_FILE, roots)
    with file:
        file.seek(table.begin)
        for first, count in blocks(table):
            size = count * table.shape[1] * ITEM_BYTES[table.dtype]
            raw = file.read(size)
            if len(raw) < size:
                raise MalformedFileError(f"{WEIGHTS_FILE} ended while it was read")
            block = decode(table.dtype, raw).reshape(count, -1)
            found += (first + np.flatnonzero(base.changed_rows(entry.path, first, block))).tolist()
    return tuple(found) if len(found) <= rows // 2 else range(rows)


def check_unchanged(
    base: FrozenBase, entry: Entry, first: int, block: Array, own: np.ndarray[Any, np.dtype[np.int64]]
) -> None:
    """Rows of a block beside those of the tokens `own`, ascending, are still the base's.

    Raises:
        MalformedFileError: they are not, so that the file is another than it was.
    """
    changed = base.changed_rows(entry.path, first, block)
    changed[own[np.searchsorted(own, first) : np.searchsorted(own, first + len(block))] - first] = False
    if changed.any():
        raise MalformedFileError(f"{WEIGHTS_FILE} was changed since it was registered; load it anew")


def blocks(table: TensorInfo) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block of a table."""
    rows, width = table.shape
    step = max(1, BLOCK_BYTES // (4 * max(width, 1)))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)
