"""Vectors that belong to tokens: each token's adapter scales an input, scales an output, or adds a bias.

For a packed projection (`LoraSite`) and tokens t with pairs p = (t, adapter slot, weight)::

    scale_input    x[t] · (1 + d[slot_p])                one vector for all slices, which share x
    scale_output   y[t, slice] *= 1 + d[slot_p, slice]
    add_bias       y[t, slice] += Σ_p weight_p · b[slot_p, slice]

IA3 is made of the first two (Liu et al., 2022), DoRA needs the last two beside its low-rank pair (Liu et al.,
2024). A scale is stored as d, its difference from 1, which half precision holds exactly enough near 1. Scales
ignore weights: a token that has such an adapter must have no other, at weight 1. Tokens without a vector keep
their bits. Plain torch on every device, a handful of calls for each site that has vectors.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite, VectorKind
from loraplex_kernels.vectors import reference

__all__ = ["add_bias", "any_vectors", "place_soft_prompts", "prefix", "scale_input", "scale_output"]


def any_vectors(pool: LoraPool, batch: LoraBatch) -> bool:
    """True if any adapter of the batch has a vector anywhere; if not, the ops need not be called."""
    return bool(pool.host.has_vectors[batch.host.pair_slot].any())


def scale_input(x: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> Tensor:
    """x ``[T, in_features]`` with the rows of tokens that have an input scale multiplied; x itself if none.

    The first slice's entry holds the vector. Raises `ValueError` where x does not fit the site or the batch.
    """
    batch.check_rows(x, "x", site.in_features)
    rows = reference.gather(pool, site, batch, VectorKind.INPUT_SCALE, 0)
    if rows is None:
        return x
    dispatch.count("vectors.scale_input", "torch")
    return reference.scaled(x, rows)


def scale_output(y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """Multiply y ``[T, N]``, N at least ``site.out_features``, in place. Raises as `scale_input` does."""
    batch.check_rows(y, "y", site.out_features)
    for index, (column, width) in enumerate(site.slices):
        rows = reference.gather(pool, site, batch, VectorKind.OUTPUT_SCALE, index)
        if rows is not None:
            dispatch.count("vectors.scale_output", "torch")
            reference.scale(y[:, column : column + width], rows)


def add_bias(y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """Add weighted biases to y ``[T, N]`` in place, a token's pairs in order. Raises as the others do."""
    batch.check_rows(y, "y", site.out_features)
    for index, (column, width) in enumerate(site.slices):
        rows = reference.gather(pool, site, batch, VectorKind.BIAS, index)
        if rows is not None:
            dispatch.count("vectors.add_bias", "torch")
            reference.add(y[:, column : column + width], rows)


def place_soft_prompts(x: Tensor, virtual: Tensor, pool: LoraPool, batch: LoraBatch) -> None:
    """Put the embeddings of virtual tokens in their places of x ``[T, hidden]``, in place.

    virtual: int64 ``[T]`` on the host; -1 - r for row r of the soft prompt of the token's one adapter, and
    anything from 0 on for other tokens. Raises `ValueError` where a virtual token has no such adapter.
    """
    reference.place_soft_prompts(x, virtual.numpy(), pool, batch)


def prefix(
    pool: LoraPool, slot: int, tokens: range, num_layers: int, num_kv_heads: int, head_dim: int
) -> Tensor:
    """Keys and values of virtual tokens of a prefix, ``[layers, 2, tokens, Hkv, D]``: a view if possible.

    Raises `ValueError` where the slot's adapter has none.
    """
    if pool.host.vector_offset[slot, VectorKind.PREFIX, 0] < 0:
        raise ValueError(f"the adapter in slot {slot} has no prefix")
    width, each = num_kv_heads * head_dim, 2 * num_layers
    rows = pool.block(slot, VectorKind.PREFIX, 0, width, tokens.start * each, len(tokens) * each)
    return rows.view(len(tokens), num_layers, 2, num_kv_heads, head_dim).permute(1, 2, 0, 3, 4)
