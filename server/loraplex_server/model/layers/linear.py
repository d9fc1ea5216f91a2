"""Frozen projections with adapters on top; they replace a decoder's `nn.Linear`.

Sibling projections that read one input (q, k, v; gate, up) form a group: one product with the frozen
weights, one shrink and one expand serve them all. The first sibling called computes; the others take
their columns. Every call checks that the siblings share their input.
"""

from __future__ import annotations

import dataclasses

import torch

from loraplex_kernels import dense, parallel
from loraplex_kernels.pool import LoraSite
from loraplex_server.model.layers import context
from loraplex_server.model.layers.weights import FrozenWeight

# Multiply-adds per microsecond of one core, then the rows whose products take as long as reading the weight.
_PRODUCTS_PER_US = 40_000
_MIN_ROWS = 4


@dataclasses.dataclass(eq=False)
class SiteGroup:
    """One or more projections of one input.

    Attributes:
        paths: module path of each projection, in the order of `site.slices`.
        weights: frozen weights; their rows together are the packed output row.
        bias: [out] of the packed row, zero where a sibling has none; None where all have none.
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
    """The unquantised output head; it replaces an `nn.Linear` and shares its parameters."""

    def __init__(self, linear: torch.nn.Linear, site: LoraSite) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._site = site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to logits [..., vocabulary + tokens that adapters of this step add].

        A row's logits of added tokens are valid only for the tokens that its adapter has.
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
    """Estimated microseconds of one core for x [..., in] times a weight [out_features, in]."""
    rows = x.numel() // x.shape[-1]
    return max(rows, _MIN_ROWS) * x.shape[-1] * out_features / _PRODUCTS_PER_US
