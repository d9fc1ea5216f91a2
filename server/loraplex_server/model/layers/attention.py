"""The paged attention function that transformers models call in place of their own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from loraplex_kernels import parallel
from loraplex_kernels.attention import LayerShape, paged_attention, write_kv
from loraplex_kernels.attention.rotary import rotate_and_write
from loraplex_server.model.layers import context

NAME = "loraplex_paged"

# Multiply-adds per microsecond of one CPU core, over a paged cache.
_PRODUCTS_PER_US = 5_000


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Writes the step's keys and values to the paged cache, then attends over it.

    If the layer deferred the rotation of queries and keys (`layers/fusion`), it is done here first. There is
    no mask: causality and windows follow from the step's tables.

    Args:
        query: [1, heads, T, head_dim].
        key: [1, kv_heads, T, head_dim].
        value: [1, kv_heads, T, head_dim].

    Returns:
        [1, T, heads, head_dim], and None for the attention weights.

    Raises:
        ValueError: attention sinks, or values and keys of different widths.
    """
    if s_aux is not None:
        raise ValueError("attention sinks are not supported")
    if value.shape[-1] != key.shape[-1]:
        raise ValueError("values of another width than keys are not supported")
    step = context.current()
    layer = module.layer_idx
    assert isinstance(layer, int)
    cache = step.kv_caches[layer]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if step.seen is not None:
        step.seen[layer] = LayerShape(q.shape[1], k.shape[1], q.shape[2], q.dtype, sliding_window)
    rotated = not step.rotations
    if rotated:
        write_kv(k, v, cache, step.attention)
    else:
        rotation = step.rotations.pop()
        rotate_and_write(q, k, v, rotation.cos[0], rotation.sin[0], cache, step.attention)
    with parallel.threads_for(step.attended * q.shape[1] * q.shape[2] / _PRODUCTS_PER_US):
        out = paged_attention(
            q,
            cache,
            step.attention,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            # Keys that were rotated while being written are in the cache only.
            k=k if rotated else None,
            v=v if rotated else None,
        )
    return out.unsqueeze(0), None


def register() -> None:
    """Registers the function with transformers as `NAME`; may be called more than once."""
    AttentionInterface.register(NAME, _attend)
