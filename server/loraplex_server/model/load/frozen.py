"""The base model's weights for the loading of adapters (implements `core.frozen_base`).

Each query dequantises a group of projections to fp32, which is exact in every format, and drops the result.
The tables of the vocabulary layers are not quantised; queries convert them to fp32 block by block.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from loraplex_kernels import dense
from loraplex_server.core.frozen_base import Array, FrozenProjection
from loraplex_server.model.layers.linear import SiteGroup

_BLOCK_ROWS = 4096
"""Rows of a table that are converted to fp32 at a time."""


class FrozenProjections:
    """The projections of some groups, and the tables of the vocabulary layers, by module path.

    Args:
        embedding: path and table [tokens, hidden] of the embedding.
        head: path, table and bias [tokens] of the head.
    """

    def __init__(
        self,
        groups: Iterable[SiteGroup],
        embedding: tuple[str, torch.Tensor] | None = None,
        head: tuple[str, torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        self._found: dict[str, FrozenProjection] = {}
        self._tables: dict[str, torch.Tensor] = {}
        for group in groups:
            shared = _Group(group)
            for index, path in enumerate(group.paths):
                first, width = group.site.slices[index]
                self._found[path] = _Projection(shared, slice(first, first + width))

        if embedding is not None:
            path, table = embedding
            self._tables[path], self._found[path] = table, _Embedding(table)
        if head is not None:
            path, table, bias = head
            self._tables[path], self._found[path] = table, _Head(table, bias)

    def projection(self, path: str) -> FrozenProjection:
        return self._found[path]

    @torch.inference_mode()
    def changed_rows(self, path: str, first: int, rows: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
        table = self._tables[path]
        ours = table[first : first + len(rows)]
        changed = np.ones(len(rows), np.bool_)
        theirs = torch.tensor(rows[: len(ours)]).to(table.device, table.dtype)
        changed[: len(ours)] = (theirs != ours).any(1).cpu().numpy()
        return changed


def _blocks(table: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for first in range(0, len(table), _BLOCK_ROWS):
        rows = slice(first, min(first + _BLOCK_ROWS, len(table)))
        yield rows, table[rows].float()


class _Embedding:
    """The embedding as a projection of one-hot tokens: W is its table transposed, [hidden, tokens]."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self._norms

    @functools.cached_property
    @torch.inference_mode()
    def _norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        total = torch.zeros(self._table.shape[1], dtype=torch.float64, device=self._table.device)
        for _, block in _blocks(self._table):
            total += block.double().square().sum(0)
        norms: np.ndarray[Any, np.dtype[np.float64]] = total.cpu().numpy()
        return norms

    @torch.inference_mode()
    def project(self, rows: Array) -> Array:
        x = torch.tensor(rows).to(self._table.device)
        total = x.new_zeros(len(x), self._table.shape[1])
        for tokens, block in _blocks(self._table):
            total += x[:, tokens] @ block
        projected: Array = total.cpu().numpy()
        return projected

    def bias(self) -> Array | None:
        return None


class _Head:
    def __init__(self, table: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._table = table
        self._bias = bias

    def squared_norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self._norms

    @functools.cached_property
    @torch.inference_mode()
    def _norms(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        parts = [block.double().square().sum(1) for _, block in _blocks(self._table)]
        norms: np.ndarray[Any, np.dtype[np.float64]] = torch.cat(parts).cpu().numpy()
        return norms

    @torch.inference_mode()
    def project(self, rows: Array) -> Array:
        x = torch.tensor(rows).to(self._table.device)
        parts = [dense.linear(x, block) for _, block in _blocks(self._table)]
        projected: Array = torch.cat(parts, dim=1).cpu().numpy()
        return projected

    def bias(self) -> Array | None:
        return None if self._bias is None else self._bias.float().cpu().numpy()


class _Group:
    """A group's weights; their norms are computed on first use and kept."""

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
