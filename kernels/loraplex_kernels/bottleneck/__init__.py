"""Bottleneck adapters: a small network of the adapter after a frozen projection, or parallel to it.

For a site of one slice with output y ``[T, H]``, the residual stream r ``[T, H]`` that y will be added to,
and the tokens t of an adapter that has width b there::

    y[t] += U.T f(D v[t] + d) + u        D, U [b, H], d [b], u [H], v one of y, y + r, r (`BottleneckReads`)

as Houlsby et al. (2019), Pfeiffer et al. (2020) and He et al. (2021, parallel) place it. A factor on the
whole is part of U and u. Pairs' weights are ignored: a token that has such an adapter must have no other, at
weight 1. Two products for each adapter and site, plain torch on every device.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels.bottleneck import reference
from loraplex_kernels.bottleneck.reference import NON_LINEARITIES
from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite

__all__ = ["NON_LINEARITIES", "add", "any_networks", "reads_residual"]


def any_networks(pool: LoraPool, batch: LoraBatch) -> bool:
    """True if any adapter of the batch has a network anywhere; if not, `add` need not be called."""
    return reference.any_networks(pool, batch)


def reads_residual(pool: LoraPool, batch: LoraBatch, site: LoraSite) -> bool:
    """True if `add` needs the residual stream at this site."""
    return any(network.reads_residual for network in reference.networks(pool, batch, site))


def add(y: Tensor, residual: Tensor | None, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """Add to rows of y ``[T, H]`` in place; residual ``[T, H]``, or None where no network reads it.

    Raises `ValueError` where y does not fit the site or the batch, or the residual is missing.
    """
    networks = reference.networks(pool, batch, site)
    if not networks:
        return
    if y.dim() != 2 or y.shape[1] != site.out_features or y.shape[0] < batch.num_tokens:
        raise ValueError(
            f"y must be at least [{batch.num_tokens}, {site.out_features}] as the batch and the site say, "
            f"got {tuple(y.shape)}"
        )
    if residual is None and reads_residual(pool, batch, site):
        raise ValueError("an adapter reads the residual stream here, and none was given")
    for network in networks:
        reference.add(y, residual, network)
