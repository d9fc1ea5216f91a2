"""Weights of an adapter's own in place of the base's: its tokens get what its weights compute.

For a packed projection (`LoraSite`) and the tokens t of a slot with a `WEIGHT` at slice s::

    y[t, slice s] = x[t] @ W[slot, s].T + b[slot, s]

with b only where the adapter has one. What the base computed for those tokens is thrown away. Pairs' weights
are ignored: a token that has such an adapter must have no other, at weight 1. A product for each adapter and
slice, plain torch on every device.
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
