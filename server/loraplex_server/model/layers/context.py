"""The context of the running step, for the modules inside a transformers model.

`nn.Linear.forward` takes only its input. The linears and the attention function therefore read the step's
tables from a module-level variable, which only this file holds.
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
    """One forward pass. `model/run` fills every field but `rotations`.

    Attributes:
        attention: the ragged batch, shared by all layers.
        kv_caches: one tensor per layer, [num_blocks, 2, num_kv_heads, block_size, head_dim].
        effects: the adapters' effects at the projections, in order; empty in a step without adapters.
        attended: number of (query, key) pairs in the batch, a measure of the attention's cost.
        norms: the adapters' effects at norms; empty if no adapter replaces one.
        head: the adapters' effects at the head, whose input has only the sampled and scored rows.
        added_tokens: the most tokens that one of these adapters adds to the vocabulary.
        seen: if given, each layer records here the shape that it asks of the attention, by layer index.
        unfused: True if an adapter acts between the projections, so that nothing may be fused there
            (`layers/fusion`).
        rotations: the deferred rotation that the next attention call has to do, at most one; `layers/fusion`
            appends it and `layers/attention` removes it.
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
    """Makes `context` the current step inside a with block.

    Raises:
        RuntimeError: another step is running; blocks do not nest.
    """
    global _current
    if _current is not None:
        raise RuntimeError("a step is running already; use the runner in one thread only")
    _current = context
    try:
        yield
    finally:
        _current = None


def current() -> StepContext:
    """The running step.

    Raises:
        RuntimeError: no step is running; only the runner may call the model.
    """
    if _current is None:
        raise RuntimeError("no step is running; call the model through the runner")
    return _current
