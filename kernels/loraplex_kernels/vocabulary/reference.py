"""The vocabulary ops in plain torch, one adapter after the other.

Token ids stay on the device, where the step before may have sampled them: nothing waits for them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels import dense, dispatch
from loraplex_kernels.parallel import PRODUCTS_PER_US, threads_for
from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite, VectorKind


def acts_at(pool: LoraPool, batch: LoraBatch, entry: int) -> bool:
    """True if any adapter of the batch has a pair or a vector at `entry`; if not, no op need be called."""
    slots, host = batch.host.segment[:, 0], pool.host
    return bool(host.rank[slots, entry].any() or (host.vector_offset[slots, :, entry] >= 0).any())


def added_tokens(pool: LoraPool, batch: LoraBatch, entry: int, vocabulary: int) -> np.ndarray:
    """The number of ids past `vocabulary` that a token's adapter has at `entry`: int64 ``[num_tokens]``."""
    added = np.zeros(batch.num_tokens, np.int64)
    for slot, first, end in batch.host.segment.tolist():
        tokens = pool.host.tokens.get((slot, entry))
        if tokens is not None:
            added[batch.host.pair_token[first:end]] = max(0, int(tokens[-1]) + 1 - vocabulary)
    return added


def check_ids(ids: np.ndarray, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    host, entry = batch.host, site.first_entry
    unknown = ids >= site.in_features
    for slot, first, end in host.segment.tolist():
        tokens = pool.host.tokens.get((slot, entry))
        if tokens is not None:
            rows = host.pair_token[first:end]
            unknown[rows] &= ids[rows] > tokens[-1]
    if unknown.any():
        raise ValueError(f"token id {ids[unknown][0]} is outside the vocabulary and its adapter has no row")


def place_rows(
    x: Tensor, ids: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, scale: float
) -> None:
    host, entry, hidden = batch.host, site.first_entry, x.shape[1]
    for slot, first, end in host.segment.tolist():
        if (slot, entry) not in pool.host.tokens:
            continue
        dispatch.count("vocabulary.place_rows", "torch")
        tokens = _tokens(pool, batch, slot, entry)
        rows = torch.from_numpy(host.pair_token[first:end]).to(x.device)
        wanted = ids.index_select(0, rows)
        at = torch.searchsorted(tokens, wanted).clamp_(max=len(tokens) - 1)
        found = tokens.index_select(0, at) == wanted
        own = pool.matrix(slot, VectorKind.TOKEN_ROWS, entry, len(tokens), hidden)
        values = own.index_select(0, at).to(x.dtype)
        if scale != 1:
            values = values * scale
        x.index_copy_(0, rows, torch.where(found[:, None], values, x.index_select(0, rows)))


def add_low_rank(
    x: Tensor, ids: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, scale: float
) -> None:
    host, entry, hidden = batch.host, site.first_entry, x.shape[1]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    delta: Tensor | None = None
    touched = np.zeros(len(x), np.bool_)
    for slot, first, end in host.segment.tolist():
        if not pool.host.rank[slot, entry]:
            continue
        touched[host.pair_token[first:end]] = True
        rows = torch.from_numpy(host.pair_token[first:end]).to(x.device)
        wanted = ids.index_select(0, rows)
        columns = wanted.clamp(0, site.in_features - 1)
        h = pool.a(slot, entry, site.in_features).index_select(1, columns).T.to(accumulate)
        if pool.scaled:
            h = h * pool.scale(slot, entry, hidden).to(accumulate)
        weight = torch.from_numpy(host.pair_weight[first:end] * np.float32(scale)).to(x.device, accumulate)
        h = h * torch.where(wanted == columns, weight, 0.0)[:, None]
        if delta is None:
            delta = x.new_zeros(x.shape, dtype=accumulate)
        delta.index_add_(0, rows, h @ pool.b(slot, entry, hidden).to(accumulate))
    if delta is None:
        return
    dispatch.count("vocabulary.add_low_rank", "torch")
    changed = torch.from_numpy(np.flatnonzero(touched)).to(x.device)
    summed = x.index_select(0, changed).to(accumulate) + delta.index_select(0, changed)
    x.index_copy_(0, changed, summed.to(x.dtype))


def replace_logits(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    host, entry, hidden = batch.host, site.first_entry, site.in_features
    for slot, first, end in host.segment.tolist():
        tokens = pool.host.tokens.get((slot, entry))
        if tokens is None:
            continue
        if tokens[-1] >= y.shape[1]:
            raise ValueError(f"y has {y.shape[1]} columns, an adapter has a row for token {tokens[-1]}")
        dispatch.count("vocabulary.replace_logits", "torch")
        rows = torch.from_numpy(host.pair_token[first:end]).to(x.device)
        own = pool.matrix(slot, VectorKind.TOKEN_ROWS, entry, len(tokens), hidden).to(x.dtype)
        with threads_for(len(rows) * own.numel() / PRODUCTS_PER_US):
            logits = dense.linear(x.index_select(0, rows), own, None)
        begin, end_token = int(tokens[0]), int(tokens[-1]) + 1
        if end_token - begin == len(tokens):
            y[:, begin:end_token].index_copy_(0, rows, logits)
        else:
            columns = _tokens(pool, batch, slot, entry)
            y.index_put_((rows[:, None], columns[None, :]), logits)


def _tokens(pool: LoraPool, batch: LoraBatch, slot: int, entry: int) -> Tensor:
    """The tokens of a slot's rows on the device, kept with the batch."""
    key = ("token rows", pool, slot, entry)
    tokens = pool.host.tokens[slot, entry]
    return batch.derived(key, pool.host.version, lambda: torch.from_numpy(tokens).to(pool.arena.device))
