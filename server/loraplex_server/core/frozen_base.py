"""The base model's weights, as the loading of adapters reads them.

DoRA's magnitudes are relative to the base's weights. An adapter's copy of the embedding or the head counts
only where its rows differ from the base's.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]


class FrozenProjection(Protocol):
    """One projection of the base: y = W x + bias with W [out, in].

    W has the values that steps multiply with, so it is rounded if the base is quantised. Any thread may call.
    """

    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The sum of squares of each row of W: float64 [out]."""

    def project(self, rows: Array) -> Array:
        """rows @ W.T without the bias: float32 [n, in] to float32 [n, out]."""

    def bias(self) -> Array | None:
        """The bias, float32 [out]; None if the projection has none."""


class FrozenBase(Protocol):
    """The base model's weights by module path. For the embedding, W is its table transposed."""

    def projection(self, path: str) -> FrozenProjection: ...

    def changed_rows(self, path: str, first: int, rows: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Compares `rows`, float32 [n, hidden], with the base's table from row `first` on.

        The comparison is in the table's dtype. Rows past the end of the table count as changed.

        Args:
            path: of the embedding or the head.

        Returns:
            bool [n]: True where a row differs.
        """
