"""Norms whose weights adapters may replace; this works for every class of norm."""

from __future__ import annotations

import copy
from typing import Any

import torch

from loraplex_server.model.layers import context
from loraplex_server.model.parts import Norm, NormSite


def attach(norm: torch.nn.Module, described: Norm, entry: int) -> NormSite:
    """Wraps the forward pass of `norm` so that it applies the step's adapters; returns its site.

    Args:
        entry: row of the norm in the adapter tables.
    """
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
