"""Segmented-gather LoRA: many adapters of many ranks on one batch of flattened tokens, without merging
weights.

For a packed projection (`LoraSite`), tokens t with pairs p = (t, adapter slot, weight), and slices s::

    y[t, slice s] += Σ_p  weight_p · (x[t] @ A[slot_p, s].T) @ B[slot_p, s]

The sum runs over the token's pairs in the order given, in one float32 accumulation with one rounding into y,
without atomics: the same input gives the same bits. Rows of y whose token has no adapter are not touched, and
no value of an adapter, NaN included, reaches a row of another.

`shrink` is the first product, for all slices of the site in one launch; `expand` the second, in another;
`apply` does both. `LoraBatch` holds the step's metadata, `LoraPool` the adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.lora import gather, reference
from loraplex_kernels.pool import LoraBatch, LoraPool, LoraSite

__all__ = ["apply", "expand", "shrink"]


def shrink(x: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> Tensor:
    """First product of every pair with every slice's A, to be handed to `expand`.

    x: ``[T, in_features]``, the pool's dtype, rows contiguous, T at least ``batch.num_tokens``.
    Returns h: float32 ``[pairs, num_slices, planes, max_rank]``, partial sums over planes; columns from a
    pair's padded rank on are undefined. Raises `ValueError` for shapes, dtypes or devices that do not fit.
    """
    _check(x, "x", site.in_features, pool, site, batch)
    chosen = dispatch.backend(x.device)
    dispatch.count("lora.shrink", chosen)
    if chosen == "triton":
        from loraplex_kernels.lora import launch

        return launch.shrink(x, pool, site, batch)
    return reference.shrink(x, pool, site, batch)


def expand(h: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, y: Tensor) -> None:
    """Second product, weighted, summed over each token's pairs and added to y in place.

    h: from `shrink` with the same arguments. y: ``[T, N]`` with N at least ``site.out_features``, the pool's
    dtype, rows contiguous (a column range of a wider tensor will do). Raises as `shrink` does.
    """
    _check(y, "y", site.out_features, pool, site, batch)
    chosen = dispatch.backend(y.device)
    dispatch.count("lora.expand", chosen)
    if chosen == "triton":
        from loraplex_kernels.lora import launch

        launch.expand(h, pool, site, batch, y)
    else:
        reference.expand(h, pool, site, batch, y)


def apply(x: Tensor, y: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    """`shrink`, then `expand`: add every adapter's delta of this site to y in place.

    x: ``[T, in_features]``; y: ``[T, N]``. Callers skip the op where ``batch.num_pairs`` is 0.
    """
    if dispatch.backend(x.device) == "triton":
        expand(shrink(x, pool, site, batch), pool, site, batch, y)
        return
    _check(x, "x", site.in_features, pool, site, batch)
    _check(y, "y", site.out_features, pool, site, batch)
    dispatch.count("lora.apply", "torch")
    if x.is_cpu and x.dtype in (torch.float32, torch.float64) and not pool.scaled:
        gather.apply(x, y, pool, site, batch)
    else:
        reference.apply(x, y, pool, site, batch)


def _check(rows: Tensor, name: str, columns: int, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> None:
    arena, shape = pool.arena, rows.shape
    if (
        batch.num_pairs
        and len(shape) == 2
        and (shape[1] == columns or (shape[1] > columns and name == "y"))
        and shape[0] >= batch.num_tokens
        and (rows.is_contiguous() or rows.stride(1) == 1)
        and rows.dtype == pool.dtype
        and rows.device == arena.device == batch.pair_token.device
        and site.first_entry + len(site.slices) <= pool.num_entries
    ):
        return
    raise ValueError(_problem(rows, name, columns, pool, site, batch))


def _problem(rows: Tensor, name: str, columns: int, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> str:
    """The message for what `_check` found; apart, since the check runs at every site of every step."""
    if batch.num_pairs == 0:
        return "batch has no pair: skip the op where batch.num_pairs is 0"
    if rows.dim() != 2 or rows.shape[1] < columns or (name == "x" and rows.shape[1] != columns):
        wanted = f"[T, {columns}]" if name == "x" else f"[T, {columns} or more]"
        return f"{name} must be {wanted}, got {tuple(rows.shape)}"
    if rows.shape[0] < batch.num_tokens:
        return f"{name} has {rows.shape[0]} rows, the batch's tokens need {batch.num_tokens}"
    if rows.dtype != pool.dtype:
        return f"{name} must be {pool.dtype} as the adapters are, got {rows.dtype}"
    if rows.device != pool.arena.device or rows.device != batch.pair_token.device:
        return (
            f"{name} is on {rows.device}, the adapters on {pool.arena.device}, "
            f"the batch on {batch.pair_token.device}: they must be on one device"
        )
    end = site.first_entry + site.num_slices
    if end > pool.num_entries:
        return f"the site's entries end at {end}, the pool has {pool.num_entries}"
    return f"{name} must have contiguous rows, got strides {rows.stride()}"
