"""What loading an adapter may need to know of the base: DoRA's magnitudes are relative to its weights."""

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
    """The base model's projections by module path."""

    def projection(self, path: str) -> FrozenProjection: ...
