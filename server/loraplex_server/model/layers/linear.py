"""Frozen projections with adapters, which replace the decoder's `nn.Linear` modules.

Sibling projections with the same input (q, k, v; gate, up) form a group. One product with the frozen weights,
one shrink and one expand serve the whole group: the first sibling called computes the output, the others take
their columns of it. Every call checks that its input is the same tensor.
"""

from __future__ import annotations

import dataclasses

import torch

from loraplex_kernels import dense, parallel
from loraplex_kernels.pool import LoraSite
from loraplex_server.model.layers import context
from loraplex_server.model.layers.weights import FrozenWeight

# Multiply-adds per microsecond of one CPU core.
_PRODUCTS_PER_US = 40_000
# Reading the weight takes as long as the products of this many rows.
_MIN_ROWS = 4


@dataclasses.dataclass(eq=False)
class SiteGroup:
    """One or several projections of one input.

    Attributes:
        paths: module path of each projection, in the order of `site.slices`.
        site: the group's entries in the adapter tables, and each projection's columns.
        weights: frozen weights; concatenated along `out` they give the packed output.
        bias: [out] of the packed output, zero for siblings without one; None if no sibling has one.
    """

    paths: tuple[str, ...]
    site: LoraSite
    weights: list[FrozenWeight]
    bias: torch.Tensor | None
    _input: torch.Tensor | None = None
    _output: torch.Tensor | None = None
    _taken: int = 0

    def project(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Columns of projection `index` of the packed output, [..., out_index], for x [..., in]."""
        if self._input is not x:
            self._input, self._output, self._taken = x, self._compute(x), 0
        assert self._output is not None
        first, width = self.site.slices[index]
        columns = self._output[..., first : first + width]
        self._taken += 1
        if self._taken == len(self.site.slices):
            self._input = self._output = None
        return columns

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        effects = context.current().effects
        for effect in effects:
            rows = effect.before(self.site, rows)
        with parallel.threads_for(_product_us(rows, self.site.out_features)):
            y = self._frozen(rows)
        for effect in effects:
            effect.after(self.site, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _frozen(self, rows: torch.Tensor) -> torch.Tensor:
        if len(self.weights) == 1:
            return self.weights[0].matmul(rows, self.bias)
        parts = torch.cat([weight.matmul(rows, None) for weight in self.weights], dim=-1)
        return parts if self.bias is None else parts.add_(self.bias)


class FrozenHead(torch.nn.Module):
    """The output head, unquantised. It replaces an `nn.Linear` and shares its parameters."""

    def __init__(self, linear: torch.nn.Linear, site: LoraSite) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary + the step's `added_tokens`] of x [..., hidden].

        Logits of added tokens are meaningful only in rows whose adapter has these tokens.
        """
        with parallel.threads_for(_product_us(x, self.weight.shape[0])):
            y = dense.linear(x, self.weight, self.bias)
        step = context.current()
        if not step.head:
            return y
        if step.added_tokens:
            y = torch.nn.functional.pad(y, (0, step.added_tokens))
        rows, logits = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for effect in step.head:
            effect.after(self._site, rows, logits)
        return y


class SiteLinear(torch.nn.Module):
    """Projection `index` of a group; it replaces an `nn.Linear`."""

    def __init__(self, group: SiteGroup, index: int) -> None:
        super().__init__()
        self._group = group
        self._index = index
        self.in_features = group.site.in_features
        self.out_features = group.site.slices[index][1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], with the current step's adapters."""
        return self._group.project(self._index, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _product_us(x: torch.Tensor, out_features: int) -> float:
    """Rough time in microseconds of x [..., in] times a weight [out_features, in] on one CPU core."""
    rows = x.numel() // x.shape[-1]
    return max(rows, _MIN_ROWS) * x.shape[-1] * out_features / _PRODUCTS_PER_US
