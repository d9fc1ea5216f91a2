"""Adapters of the vocabulary layers: rows and low-rank pairs of token ids, at the embedding and the head.

The embedding is a site with ``in_features`` tokens of the base's vocabulary and one slice, the hidden size.
With E the base's table and s its scale (1 for most models), the embedding of token id i at position t is::

    place_rows     s · R[slot, i]                     where t's adapter has a row for i, in place of s · E[i]
    add_low_rank   + s · Σ_p weight_p · A[slot_p, :, i] @ B[slot_p]  for i of the base's vocabulary

At the head, whose one slice is the vocabulary, an adapter's rows give its tokens' logits::

    replace_logits  y[t, i] = x[t] @ R[slot, i]           for each token id i that t's adapter has a row for

Ids from the base's vocabulary on are tokens that an adapter added: only its own tokens may have them. Rows
ignore weights: a token that has such an adapter must have no other, at weight 1. Plain torch on every device,
for the adapters of the batch that act there.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite
from loraplex_kernels.vocabulary import reference
from loraplex_kernels.vocabulary.reference import acts_at, added_tokens

__all__ = ["acts_at", "add_low_rank", "added_tokens", "check_ids", "place_rows", "replace_logits"]


def check_ids(ids: np.ndarray, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """Raise `ValueError` where one of the ids int64 ``[T]``, as far as the host knows them, is not below
    ``site.in_features`` and its token's adapter has no such row.
    """
    reference.check_ids(ids, pool, site, batch)


def place_rows(
    x: Tensor, ids: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, scale: float
) -> None:
    """Overwrite rows of the embeddings x ``[T, hidden]`` of token ids, int64 ``[T]`` on x's device."""
    _check(x, ids, site.out_features, batch)
    reference.place_rows(x, ids, pool, site, batch, scale)


def add_low_rank(
    x: Tensor, ids: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, scale: float
) -> None:
    """Add low-rank pairs to the embeddings x ``[T, hidden]``: one sum in float32, one rounding into x."""
    _check(x, ids, site.out_features, batch)
    reference.add_low_rank(x, ids, pool, site, batch, scale)


def replace_logits(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """Overwrite logits y ``[T, N]``, N above the largest token with a row; x ``[T, hidden]``.

    Raises `ValueError` where y is too narrow.
    """
    reference.replace_logits(x, y, pool, site, batch)


def _check(x: Tensor, ids: Tensor, hidden: int, batch: LoraBatch) -> None:
    if x.dim() != 2 or x.shape[1] != hidden or len(x) != len(ids) or len(x) < batch.num_tokens:
        raise ValueError(
            f"x must be [{len(ids)}, {hidden}] as the ids and the site say, and at least the batch's "
            f"{batch.num_tokens} tokens; got {tuple(x.shape)}"
        )
