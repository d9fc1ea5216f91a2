"""The base model's weights as the loading of adapters reads them.

DoRA's magnitudes are relative to the base's weights. An adapter's copy of the
vocabulary counts only where it differs from the base's.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


class FrozenProjection(Protocol):
    """One projection of the base: W `[out, in]`, as the steps multiply with it. Thread-safe."""

    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[out]: the sum of squares of each row of W."""

    def project(self, rows: Array) -> Array:
        """Computes rows @ W.T, [n, out], of rows [n, in], without the bias."""

    def bias(self) -> Array | None:
        """The bias [out], or None."""


class FrozenBase(Protocol):
    """The base model's weights by module path; the embedding's W is its table transposed."""

    def projection(self, path: str) -> FrozenProjection: ...

    def changed_rows(self, path: str, first: int, rows: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[n]: true for each of `rows`, [n, hidden], that differs from the base's row.

        Row i is compared with row `first` + i of the table of the embedding or the head at `path`, in the
        table's dtype. Rows beyond the table differ.
        """
