"""Replaced weights in plain torch; the tokens of each weight are computed once per batch and entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels import dense, dispatch
from loraplex_kernels.parallel import PRODUCTS_PER_US, threads_for
from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite, VectorKind


@dataclass(frozen=True, eq=False)
class OwnWeight:
    """One adapter's weight at one entry.

    - `tokens` int64 ``[n]``, the rows of the batch that use it
    - `weight` ``[rows, length]``, `bias` ``[rows]`` or None, in the pool's compute dtype
    """

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None


def any_weights(pool: LoraPool, batch: LoraBatch) -> bool:
    """True if any adapter of the batch has a weight anywhere; if not, the op need not be called."""
    slots = batch.host.segment[:, 0]
    return bool((pool.host.vector_offset[slots, VectorKind.WEIGHT] >= 0).any())


def own_weights(
    pool: LoraPool, batch: LoraBatch, entry: int, rows: int, length: int
) -> tuple[OwnWeight, ...]:
    key = ("replacement", pool, entry)
    return batch.derived(key, pool.host.version, lambda: _own_weights(pool, batch, entry, rows, length))


def _own_weights(
    pool: LoraPool, batch: LoraBatch, entry: int, rows: int, length: int
) -> tuple[OwnWeight, ...]:
    offset, found = pool.host.vector_offset, []
    for slot, first, end in batch.host.segment.tolist():
        if offset[slot, VectorKind.WEIGHT, entry] < 0:
            continue
        bias: Tensor | None = None
        if offset[slot, VectorKind.WEIGHT_BIAS, entry] >= 0:
            bias = pool.vector(slot, VectorKind.WEIGHT_BIAS, entry, rows)
        found.append(
            OwnWeight(
                tokens=torch.from_numpy(batch.host.pair_token[first:end]).to(pool.arena.device),
                weight=pool.matrix(slot, VectorKind.WEIGHT, entry, rows, length).to(pool.dtype),
                bias=bias,
            )
        )
    return tuple(found)


def linear(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """`replacement.linear`, one adapter after the other."""
    for index, (column, width) in enumerate(site.slices):
        for own in own_weights(pool, batch, site.first_entry + index, width, site.in_features):
            dispatch.count("replacement.linear", "torch")
            with threads_for(len(own.tokens) * own.weight.numel() / PRODUCTS_PER_US):
                rows = dense.linear(x.index_select(0, own.tokens), own.weight, own.bias)
            y[:, column : column + width].index_copy_(0, own.tokens, rows)
