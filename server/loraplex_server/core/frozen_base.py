"""What loading an adapter may need to know of the base: DoRA's magnitudes are relative to its weights, and a
copy of its vocabulary that nothing was trained in is none.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


class FrozenProjection(Protocol):
    """One projection of the base, W `[out, in]` as the steps multiply with it; any thread may ask."""

    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[out]: the sum of squares of each row of W."""

    def project(self, rows: Array) -> Array:
        """[n, in] to rows @ W.T, [n, out], without the bias."""

    def bias(self) -> Array | None:
        """[out], None where there is none."""


class FrozenBase(Protocol):
    """The base model's weights by module path; the embedding's W is its table transposed."""

    def projection(self, path: str) -> FrozenProjection: ...

    def changed_rows(self, path: str, first: int, rows: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[n]: which of `rows`, [n, hidden], are not those from `first` on of the table of the embedding or
        the head at `path`, in the dtype in which it is held. Rows that it does not have are."""
