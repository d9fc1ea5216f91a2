"""Weights of an adapter that replace the base's for the adapter's tokens.

For a packed projection (`LoraSite`) and the tokens t of a slot with a `WEIGHT` at slice s::

    y[t, slice s] = x[t] @ W[slot, s].T + b[slot, s]

with b only where the adapter has one. The base's result for those tokens is discarded. Pairs' weights are
ignored: a token with such an adapter must have no other, at weight 1. One product per adapter and slice,
plain torch on every device.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite
from loraplex_kernels.replacement import reference
from loraplex_kernels.replacement.reference import OwnWeight, any_weights

__all__ = ["OwnWeight", "any_weights", "linear", "own_weights"]


def linear(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """Overwrite rows of y ``[T, N]``, N at least ``site.out_features``; x ``[T, in_features]``.

    Raises `ValueError` where x or y does not fit the site or the batch.
    """
    batch.check_rows(x, "x", site.in_features)
    batch.check_rows(y, "y", site.out_features)
    reference.linear(x, y, pool, site, batch)


def own_weights(
    pool: LoraPool, batch: LoraBatch, entry: int, rows: int, length: int
) -> tuple[OwnWeight, ...]:
    """The weights ``[rows, length]`` at `entry` that adapters of the batch have, with their tokens."""
    return reference.own_weights(pool, batch, entry, rows, length)
