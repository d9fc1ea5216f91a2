"""Rotary position embedding of a step's queries and keys, and the write of its keys and values, in one.

With cos and sin of each token, halves x₁ and x₂ of the first R values of a head become::

    x₁ · cos₁ - x₂ · sin₁        x₂ · cos₂ + x₁ · sin₂

each product and each sum rounded to the dtype of x, as transformers' modules do (Su et al., 2021; in the
order of GPT-NeoX). Values past R stay as they are. Queries are rotated where they lie; keys on their way to
the cache, and nowhere else.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.attention import CACHE_DTYPES, AttentionBatch, write_kv
from loraplex_kernels.attention.rotary import reference
from loraplex_kernels.attention.tiles import narrow_floats

__all__ = ["rotate_and_write"]


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, batch: AttentionBatch
) -> None:
    """Rotate q ``[T, Hq, D]`` in place; write k, rotated, and v ``[T, Hkv, D]`` as `write_kv` does.

    cos and sin are ``[T, R]`` in the dtype of q, R even and D at most. Raises `ValueError` where a shape or a
    dtype does not fit.
    """
    num_kv_heads, _, head_dim = kv_cache.shape[2:]
    keys = (batch.num_tokens, num_kv_heads, head_dim)
    if k.shape != keys or v.shape != keys or q.ndim != 3 or q.shape[::2] != keys[::2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a step of "
            f"{keys[0]} tokens and a cache of {num_kv_heads} heads of {head_dim}"
        )
    rotary = cos.shape[-1]
    if cos.shape != (keys[0], rotary) or sin.shape != cos.shape or rotary % 2 or rotary > head_dim:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be ({keys[0]}, an even number up to "
            f"{head_dim})"
        )
    if len({q.dtype, k.dtype, v.dtype, cos.dtype, sin.dtype}) > 1:
        raise ValueError(
            f"q is in {q.dtype}, k in {k.dtype}, v in {v.dtype}, cos in {cos.dtype}, sin in {sin.dtype}: "
            "they must be of one dtype"
        )
    if batch.num_tokens and _backend(q, kv_cache) == "triton":
        from loraplex_kernels.attention.rotary import launch

        launch.rotate_and_write(q, k, v, cos, sin, kv_cache, batch.slots)
        return
    dispatch.count("rotary.write", "torch")
    q.copy_(reference.rotate(q, cos, sin))
    write_kv(reference.rotate(k, cos, sin), v, kv_cache, batch)


def _backend(q: Tensor, kv_cache: Tensor) -> dispatch.Backend:
    """The implementation for these tensors; torch for what the kernel cannot do, which is as right."""
    narrow = kv_cache.dtype.itemsize == 1
    if q.dtype not in dispatch.FLOATS or kv_cache.dtype not in CACHE_DTYPES:
        return "torch"
    chosen = dispatch.backend(q.device)
    return "torch" if chosen == "triton" and narrow and not narrow_floats(q.device) else chosen
