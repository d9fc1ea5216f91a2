"""Norms of which adapters may have weights of their own, whatever their class computes."""

from __future__ import annotations

import copy
from typing import Any

import torch

from loraplex_server.model.layers import context
from loraplex_server.model.parts import Norm, NormSite


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
