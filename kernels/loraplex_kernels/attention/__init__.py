"""Paged ragged attention: every sequence of a step, decodes and prefill chunks alike, in one call per layer.

The KV cache of a layer is one contiguous tensor [num_blocks, 2, num_kv_heads, block_size, head_dim]
(`kv_cache_shape`): a block is one contiguous piece, its keys before its values, and in each a head's
positions lie together, so that reading one head of a block is one sequential run. Build an `AttentionBatch`
once per step, then call `write_kv` and `paged_attention` in every layer. A cache may be of another dtype than
the model: values are converted as they are written and read. In float8_e4m3fn they are unscaled, and clamped
to its largest, 448.
"""

from __future__ import annotations

import torch

from loraplex_kernels import dispatch
from loraplex_kernels.attention import reference
from loraplex_kernels.attention.batch import AttentionBatch
from loraplex_kernels.attention.buffers import AttentionBuffers
from loraplex_kernels.attention.cache import head_cells, kv_cache_shape
from loraplex_kernels.attention.tiles import MAX_HEAD_DIM, LayerShape, narrow_floats

__all__ = [
    "CACHE_DTYPES",
    "AttentionBatch",
    "AttentionBuffers",
    "LayerShape",
    "kv_cache_shape",
    "paged_attention",
    "write_cells",
    "write_kv",
]

CACHE_DTYPES = (*dispatch.FLOATS, torch.float8_e4m3fn)
"""Dtypes of a KV cache."""


def write_kv(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
    """Write the step's keys and values [T, Hkv, D] to the cells of `batch`'s slot mapping, in place.

    Raises ValueError if a shape or the block size does not fit.
    """
    _check_cache(kv_cache, batch)
    expected = (batch.num_tokens, kv_cache.shape[2], kv_cache.shape[4])
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be {expected}, as the batch and cache say"
        )
    if not batch.num_tokens:
        return
    if _backend(k, kv_cache) == "triton":
        from loraplex_kernels.attention import launch

        launch.write_kv(k, v, kv_cache, batch.slots)
    else:
        reference.write_kv(k, v, kv_cache, batch)


def write_cells(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write keys and values [N, Hkv, D] that no step computed to cells of the cache, in place.

    slots [N] int64, on the cache's device: block * block_size + offset, none of them negative. Strides of k
    and v may be any. Raises ValueError if a shape does not fit.
    """
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    expected = (slots.numel(), num_kv_heads, head_dim)
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be {expected}, as the cells and the cache say"
        )
    if _backend(k, kv_cache) == "triton":
        from loraplex_kernels.attention import launch

        launch.write_kv(k, v, kv_cache, slots)
    else:
        cells = head_cells(slots.unsqueeze(1), block_size, num_kv_heads).view(-1)
        reference.write_rows(k, v, kv_cache, cells)


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the step's queries [T, Hq, D] over their sequences' cached keys and values.

    The step's own keys and values must have been written (`write_kv`). Query head h reads key head
    h // (Hq / Hkv). With `sliding_window` w the query at position i sees keys i - w < j <= i. With
    `softcap` c a scaled logit x becomes c * tanh(x / c). Softmax is in fp32. `k` and `v`, if given, are
    what `write_kv` was given: they spare reading the cache for prompts that start in this step, and never
    change the result. Cells outside a sequence's visible context may hold anything, NaN included.

    Returns [T, Hq, D] in q's dtype. Raises ValueError if a shape, the window or the cap does not fit.
    """
    _check_cache(kv_cache, batch)
    num_kv_heads, _, head_dim = kv_cache.shape[2:]
    if q.ndim != 3 or q.shape[0] != batch.num_tokens or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} must be [{batch.num_tokens}, a multiple of {num_kv_heads}, {head_dim}], "
            "as the batch and cache say"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")
    if not batch.num_tokens:
        return torch.empty_like(q)
    if _backend(q, kv_cache) == "triton":
        from loraplex_kernels.attention import launch

        shape = LayerShape(q.shape[1], num_kv_heads, head_dim, q.dtype, sliding_window)
        return launch.paged_attention(
            q,
            kv_cache,
            batch.tables.blocks,
            batch.tables.plan(shape),
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    dispatch.count("attention", "torch")
    return reference.paged_attention(
        q, kv_cache, batch, scale=scale, sliding_window=sliding_window, softcap=softcap, k=k, v=v
    )


def _backend(rows: torch.Tensor, kv_cache: torch.Tensor) -> dispatch.Backend:
    """The implementation for these tensors.

    Tensors that Triton's kernels do not support run on torch. With the setting "triton" they raise
    `KernelUnavailableError` instead.
    """
    chosen = dispatch.backend(rows.device)
    if chosen == "torch":
        return chosen
    if rows.dtype not in dispatch.FLOATS or kv_cache.dtype not in CACHE_DTYPES:
        problem = f"queries in {rows.dtype} over a cache in {kv_cache.dtype}"
    elif rows.shape[-1] > MAX_HEAD_DIM:
        problem = f"heads of {rows.shape[-1]}, more than {MAX_HEAD_DIM}"
    elif kv_cache.dtype.itemsize == 1 and not narrow_floats(rows.device):
        problem = f"a cache in {kv_cache.dtype} on a device of compute capability below 8.9"
    else:
        return chosen
    if dispatch.get_kernels() == "auto":
        return "torch"
    raise dispatch.KernelUnavailableError(f"kernels=triton has no attention for {problem}: use kernels=torch")


def _check_cache(kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
    shape = kv_cache.shape
    if len(shape) != 5 or shape[1] != 2 or shape[3] != batch.block_size or not kv_cache.is_contiguous():
        raise ValueError(
            f"kv_cache {tuple(shape)} must be contiguous "
            f"[num_blocks, 2, num_kv_heads, {batch.block_size}, head_dim]: allocate it with kv_cache_shape"
        )
    if batch.min_blocks > shape[0]:
        raise ValueError(
            f"kv_cache has {shape[0]} blocks, but blocks or slot_mapping name {batch.min_blocks - 1}"
        )
