"""The running step, as the modules inside a transformers model see it.

`nn.Linear.forward` takes only its input, so the step's tables reach the linears and the attention
function through this ambient context. There is no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from loraplex_kernels.attention import AttentionBatch, LayerShape
from loraplex_server.model.layers.effects import Effect, NormEffect


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A deferred rotation of queries and keys: cos and sin are [1, T, rotated values of a head]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclasses.dataclass(frozen=True)
class StepContext:
    """One forward pass.

    Attributes:
        attention: the ragged batch, shared by all layers.
        kv_caches: one tensor per layer, [num_blocks, 2, num_kv_heads, block_size, head_dim].
        attended: number of (query, key) pairs of the batch, the measure of the attention's cost.
        effects: the adapters' effects at each projection, in order; empty in a base-only step.
        norms: their effects at each norm; empty if no adapter of the step changes a norm.
        head: their effects at the head, whose input holds the sampled rows only.
        added_tokens: most tokens that one of the adapters adds to the vocabulary.
        seen: if given, each layer records the shape of its attention here.
        unfused: nothing between the projections may be fused (`fusion`): an adapter acts there.
        rotations: the deferred rotation for the next call of the attention; at most one.
    """

    attention: AttentionBatch
    kv_caches: tuple[torch.Tensor, ...]
    effects: tuple[Effect, ...] = ()
    attended: int = 0
    norms: tuple[NormEffect, ...] = ()
    head: tuple[Effect, ...] = ()
    added_tokens: int = 0
    seen: dict[int, LayerShape] | None = None
    unfused: bool = False
    rotations: list[Rotation] = dataclasses.field(default_factory=list)


_current: StepContext | None = None


@contextlib.contextmanager
def running(context: StepContext) -> Iterator[None]:
    """Makes `context` current inside a with block. Blocks do not nest: one step runs at a time."""
    global _current
    if _current is not None:
        raise RuntimeError("a step runs already; the runner belongs to one thread")
    _current = context
    try:
        yield
    finally:
        _current = None


def current() -> StepContext:
    """The step that runs now.

    Raises:
        RuntimeError: no step runs; only the runner may call the model.
    """
    if _current is None:
        raise RuntimeError("no step runs; call the model through the runner")
    return _current
