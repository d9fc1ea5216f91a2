"""Norms of which adapters may have weights of their own, whatever their class computes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from loraplex_server.model.load.architecture import Norm
from loraplex_server.model.run import context


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """One norm over the hidden size.

    Attributes:
        entry: its row in the adapter tables.
        plain: the norm itself, untouched; its parameters are shared with the model's.
    """

    entry: int
    width: int
    plain: torch.nn.Module

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The norm of rows x [n, width] with other parameters."""
        parameters = {"weight": weight, **({} if bias is None else {"bias": bias})}
        found: torch.Tensor = torch.func.functional_call(self.plain, parameters, (x,))
        return found


def attach(norm: torch.nn.Module, described: Norm, entry: int) -> NormSite:
    """Makes `norm` of a model ask the step's adapters, and returns the site that they know it by."""
    plain = copy.copy(norm)
    plain._parameters = dict(norm._parameters)
    site = NormSite(entry, described.width, plain)
    compute = norm.forward

    def forward(x: torch.Tensor, *args: Any) -> torch.Tensor:
        y: torch.Tensor = compute(x, *args)
        effects = context.current().norms
        if effects:
            y = y.contiguous()
            for effect in effects:
                effect.norm(site, x.reshape(-1, site.width), y.view(-1, site.width))
        return y

    norm.forward = forward
    return site
