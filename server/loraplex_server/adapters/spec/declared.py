"""Effects as an adapter's files declare them, in order, for each site.

A kind of adapter is a way to turn a file into these: LoRA declares a `LoraSpec` for each site, lora_bias a
`BiasSpec` after it, DoRA a `MagnitudeSpec` before it; IA3 an `InputScaleSpec` or an `OutputScaleSpec`;
modules_to_save an `OwnWeightSpec`; whatever changes rows of the vocabulary, added tokens included, a
`TokenRowsSpec`; AdapterHub's bottleneck adapters a `BottleneckSpec`. What a step applies in the end is the
model's side (`model.layers.effects`), which knows no kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex_server.adapters.spec.sites import Entry
from loraplex_server.adapters.spec.tensors import TensorInfo


@dataclass(frozen=True)
class InputScaleSpec:
    """x becomes x · s, with s `[in_features]` (IA3 on a feed-forward's input)."""

    scale: TensorInfo


@dataclass(frozen=True)
class LoraSpec:
    """y becomes y + scale · B A x, with A `[rank, in_features]` and B `[out_features, rank]`."""

    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class OutputScaleSpec:
    """y becomes y · s, with s `[out_features]` (IA3 on keys and values)."""

    scale: TensorInfo


@dataclass(frozen=True)
class MagnitudeSpec:
    """Rows of W + scale · B A (the `LoraSpec` that follows) get these lengths, `[out_features]` (DoRA)."""

    magnitude: TensorInfo


@dataclass(frozen=True)
class BiasSpec:
    """y becomes y + scale · b, with b `[out_features]` (lora_bias)."""

    scale: float
    bias: TensorInfo


@dataclass(frozen=True)
class OwnWeightSpec:
    """y becomes x W^T + b, or what a norm makes of x, with weights that take the place of the base's."""

    weight: TensorInfo
    bias: TensorInfo | None


@dataclass(frozen=True)
class TokenRowsSpec:
    """Rows `[tokens, hidden]` that take the place of the base's in the embedding or the head.

    Attributes:
        tokens: whose they are, ascending; from the base's vocabulary on, they are added ones. A low-rank pair
            at the same entry has columns (at the head, rows) for those, too.
        table: a whole table, row i for token i; rows of other tokens are the base's.
        trained: rows of `trained_tokens`, in place of the table's.
    """

    tokens: Sequence[int]
    table: TensorInfo | None = None
    trained: TensorInfo | None = None
    trained_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class BottleneckSpec:
    """y becomes y + scale · (U f(D v + d) + u), with D `[width, hidden]` and U `[hidden, width]`; the
    adapter's form says what f and v are. A scale that is a tensor is `[1]` or `[hidden]`.
    """

    down: TensorInfo
    down_bias: TensorInfo
    up: TensorInfo
    up_bias: TensorInfo
    scale: TensorInfo | float


@dataclass(frozen=True)
class SoftPromptSpec:
    """Embeddings of virtual tokens before every prompt, `[tokens, hidden]`: no effect at a site."""

    embeddings: TensorInfo


@dataclass(frozen=True)
class PrefixSpec:
    """Keys and values of virtual tokens before every prompt, in every layer: no effect at a site.

    Attributes:
        keys_values: `[tokens, layers * 2 * KV heads * head_dim]`, a layer's keys before its values.
        row_length: KV heads * head_dim.
    """

    keys_values: TensorInfo
    row_length: int


EffectSpec = (
    InputScaleSpec
    | OutputScaleSpec
    | MagnitudeSpec
    | LoraSpec
    | BiasSpec
    | BottleneckSpec
    | OwnWeightSpec
    | TokenRowsSpec
)

LINEAR: tuple[type[EffectSpec], ...] = (LoraSpec, BiasSpec)
"""Effects that add something: they can be weighted, and added to those of other adapters."""


@dataclass(frozen=True)
class SiteSpec:
    """The effects at one entry, first to last."""

    entry: Entry
    effects: tuple[EffectSpec, ...]
