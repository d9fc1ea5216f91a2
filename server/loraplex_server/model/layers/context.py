"""What the modules inside a transformers model must know about the step that runs through them.

`nn.Linear.forward` takes only its input, so the step's tables reach the linears and the attention
function by ambient context, here and nowhere else.
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
    """A rotation of queries and keys that was put off: cos and sin are [1, T, rotated values of a head]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclasses.dataclass(frozen=True)
class StepContext:
    """One forward pass.

    Attributes:
        attention: the ragged batch, shared by all layers.
        kv_caches: one tensor a layer, [num_blocks, 2, num_kv_heads, block_size, head_dim].
        attended: (query, key) pairs of the batch, a measure of the attention's cost.
        effects: what adapters do at each site in this step, in order; empty in a base-only step.
        norms: what they do at each norm; empty where none has one of its own.
        head: what they do at the head, of whose input only the sampled rows are there.
        added_tokens: most that one of them adds to the vocabulary.
        seen: where given, each layer notes here what it asks of the attention.
        unfused: nothing between the projections may be fused (`fusion`): an adapter acts there.
        rotations: what the attention that is called next has to do first; at most one.
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
    """Makes `context` current inside a with block. Does not nest: one step runs at a time."""
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
        RuntimeError: none does; the model may only be called by the runner.
    """
    if _current is None:
        raise RuntimeError("no step runs; call the model through the runner")
    return _current
