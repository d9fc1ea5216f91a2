"""The LoRA op in plain torch: the specification of the Triton kernels and of the CPU path in `gather`.

`shrink` and `expand` say what the op means, one adapter and one group after the other, at the precision of
the wider of float32 and the input (float64 gives an oracle). In 8 bits the scales come into h in the expand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite


def shrink(x: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> Tensor:
    """``h[p, s, 0, :rank] = x[token of p] @ A.T`` for each pair p and slice s; columns past the rank are
    zero.

    x ``[T, in_features]`` → h ``[num_pairs, num_slices, 1, max_rank]``, float32 (float64 for a float64 x).
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros((batch.num_pairs, site.num_slices, 1, pool.max_rank), dtype=accumulate)
    for slot, first, end in batch.host.segment.tolist():
        tokens = torch.from_numpy(batch.host.pair_token[first:end]).to(x.device)
        rows = x.index_select(0, tokens).to(accumulate)
        for s in range(site.num_slices):
            a = pool.a(slot, site.first_entry + s, site.in_features)
            if len(a):
                h[first:end, s, 0, : len(a)] = rows @ a.to(accumulate).T
    return h


def expand(h: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, y: Tensor) -> None:
    """``y[t] += Σ weight · h[p] @ B`` over the pairs p of token t in their order: one sum, one rounding into
    y.
    """
    weight = torch.from_numpy(batch.host.pair_weight).to(h)
    for first, end, members in batch.host.group:
        tokens = torch.from_numpy(batch.host.group_token[first:end]).to(y.device)
        for s, (column, width) in enumerate(site.slices):
            delta: Tensor | None = None
            for slot, shift in members:
                b = pool.b(slot, site.first_entry + s, width)
                if len(b):
                    pairs = slice(first + shift, end + shift)
                    rows = h[pairs, s, :, : len(b)].sum(1) * weight[pairs, None]
                    if pool.scaled:
                        rows *= pool.scale(slot, site.first_entry + s, width).to(h.dtype)
                    term = rows @ b.to(h.dtype)
                    delta = term if delta is None else delta + term
            if delta is not None:
                columns = y[:, column : column + width]
                columns[tokens] = (columns.index_select(0, tokens).to(h.dtype) + delta).to(y.dtype)


def apply(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """`shrink`, then `expand`."""
    expand(shrink(x, pool, site, batch), pool, site, batch, y)
