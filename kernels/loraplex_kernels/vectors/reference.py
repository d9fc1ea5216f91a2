"""The vector ops in plain torch: distinct vectors are stacked once per batch and gathered by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.pool import SCALE_BYTES, LoraBatch, LoraPool, LoraSite, VectorKind


@dataclass(frozen=True)
class TokenRows:
    """Vectors of one kind and entry for the pairs that have one.

    - `vectors` ``[distinct, length]``, `index` int64 ``[pairs]``: which of them a pair has
    - `token` int64 ``[pairs]``, ascending, a token's pairs in their order
    - `weight` ``[pairs, 1]`` in the vectors' dtype, None where all are 1
    """

    vectors: Tensor
    index: Tensor
    token: Tensor
    weight: Tensor | None


def gather(
    pool: LoraPool, site: LoraSite, batch: LoraBatch, kind: VectorKind, slice_index: int
) -> TokenRows | None:
    """The rows for one slice of `site`, None where no pair has such a vector; kept with the batch."""
    key = ("vectors", pool, site, kind, slice_index)
    return batch.derived(key, pool.host.version, lambda: _gather(pool, site, batch, kind, slice_index))


def _gather(
    pool: LoraPool, site: LoraSite, batch: LoraBatch, kind: VectorKind, slice_index: int
) -> TokenRows | None:
    host, entry = batch.host, site.first_entry + slice_index
    length = site.in_features if kind is VectorKind.INPUT_SCALE else site.slices[slice_index][1]
    pairs = np.flatnonzero(pool.host.vector_offset[host.pair_slot, kind, entry] >= 0)
    if not len(pairs):
        return None
    pairs = pairs[np.lexsort((host.pair_member[pairs], host.pair_token[pairs]))]
    slots, index = np.unique(host.pair_slot[pairs], return_inverse=True)
    weight = host.pair_weight[pairs]
    device = pool.arena.device
    vectors = torch.stack([pool.vector(int(slot), kind, entry, length) for slot in slots])
    return TokenRows(
        vectors=vectors,
        index=torch.from_numpy(index.reshape(-1)).to(device),
        token=torch.from_numpy(host.pair_token[pairs]).to(device),
        weight=None if (weight == 1).all() else torch.from_numpy(weight)[:, None].to(vectors),
    )


def scaled(x: Tensor, rows: TokenRows) -> Tensor:
    """A copy of x ``[T, length]`` with the rows multiplied."""
    return x.index_copy(0, rows.token, _product(x, rows))


def scale(y: Tensor, rows: TokenRows) -> None:
    """Multiplies the rows of y ``[T, length]`` in place."""
    y.index_copy_(0, rows.token, _product(y, rows))


def add(y: Tensor, rows: TokenRows) -> None:
    """Adds each pair's vector, times its weight, to its token's row of y ``[T, length]`` in place."""
    bias = rows.vectors.index_select(0, rows.index)
    y.index_add_(0, rows.token, bias if rows.weight is None else bias * rows.weight)


def _product(values: Tensor, rows: TokenRows) -> Tensor:
    chosen = values.index_select(0, rows.token)
    return torch.addcmul(chosen, chosen, rows.vectors.index_select(0, rows.index))


def place_soft_prompts(x: Tensor, virtual: np.ndarray, pool: LoraPool, batch: LoraBatch) -> None:
    """Rows of x ``[T, hidden]`` whose `virtual` is negative get their adapter's embedding."""
    host = batch.host
    tokens = np.flatnonzero(virtual < 0)
    slot = np.full(len(virtual), -1, np.int64)
    slot[host.pair_token] = host.pair_slot
    first = np.where(slot >= 0, pool.host.vector_offset[slot, VectorKind.SOFT_PROMPT, 0], -1)[tokens]
    if (first < 0).any():
        raise ValueError("a virtual token's adapter has no soft prompt")
    hidden = x.shape[1]
    rows = pool.arena
    if pool.scaled:
        rows, first = rows.view(torch.float32), first // SCALE_BYTES
    begin = torch.from_numpy(first + (-1 - virtual[tokens]) * hidden).to(x.device)
    cells = begin[:, None] + torch.arange(hidden, device=x.device)
    x.index_copy_(0, torch.from_numpy(tokens).to(x.device), rows[cells].to(x.dtype))
