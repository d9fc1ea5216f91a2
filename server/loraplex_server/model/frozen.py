"""The base model's projections as the loading of adapters asks for them (`adapters.base`).

A group of them is dequantised to fp32 for the moment of the question: exact in every format.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from loraplex_kernels import dense
from loraplex_server.adapters.base import Array, FrozenProjection
from loraplex_server.model.linear import SiteGroup


class FrozenProjections:
    """Every projection of some groups, by module path."""

    def __init__(self, groups: Iterable[SiteGroup]) -> None:
        self._found: dict[str, _Projection] = {}
        for group in groups:
            shared = _Group(group)
            for index, path in enumerate(group.paths):
                first, width = group.site.slices[index]
                self._found[path] = _Projection(shared, slice(first, first + width))

    def projection(self, path: str) -> FrozenProjection:
        return self._found[path]


class _Group:
    """A group's weights; norms are worked out once, when first asked for, and kept."""

    def __init__(self, group: SiteGroup) -> None:
        self.group = group
        self._lock = threading.Lock()
        self._norms: np.ndarray[Any, np.dtype[np.float64]] | None = None

    @torch.inference_mode()
    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        with self._lock:
            if self._norms is None:
                parts = [weight.dequantize().double().square().sum(1) for weight in self.group.weights]
                self._norms = torch.cat(parts).cpu().numpy()
        return self._norms

    @torch.inference_mode()
    def project(self, rows: Array) -> Array:
        x = torch.tensor(rows)
        weights = (weight.dequantize() for weight in self.group.weights)
        parts = [dense.linear(x.to(weight.device), weight) for weight in weights]
        projected: Array = torch.cat(parts, dim=1).cpu().numpy()
        return projected


class _Projection:
    def __init__(self, shared: _Group, columns: slice) -> None:
        self._shared = shared
        self._columns = columns

    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self._shared.squared_norms()[self._columns]

    def project(self, rows: Array) -> Array:
        return self._shared.project(rows)[:, self._columns]

    def bias(self) -> Array | None:
        bias = self._shared.group.bias
        return None if bias is None else bias[self._columns].float().cpu().numpy()
