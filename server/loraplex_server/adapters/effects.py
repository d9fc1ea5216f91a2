"""What an adapter does at a site: an ordered list of effects.

The runner knows effects and no adapter kinds. A kind is a way to read a file into effects (`manifest`); LoRA
yields one `LowRankAdd` for each site. The other effects have a type here so that a kind that needs them is
refused by the name of what is missing, and so that adding one changes no signature.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_server.adapters.sites import Entry
from loraplex_server.adapters.tensor_file import TensorInfo


@dataclass(frozen=True)
class InputScale:
    """x becomes x · s, with s `[in_features]` (IA3 on a feed-forward's input)."""

    scale: TensorInfo


@dataclass(frozen=True)
class LowRankAdd:
    """y becomes y + scale · B A x, with A `[rank, in_features]` and B `[out_features, rank]`."""

    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class OutputScale:
    """y becomes y · s, with s `[out_features]` (IA3 on keys and values; DoRA's magnitudes)."""

    scale: TensorInfo


@dataclass(frozen=True)
class Replacement:
    """The site's own weight is exchanged for another (modules_to_save, resized embeddings)."""

    weight: TensorInfo
    bias: TensorInfo | None = None


Effect = InputScale | LowRankAdd | OutputScale | Replacement

SERVED: tuple[type[Effect], ...] = (LowRankAdd,)
"""The effects that the runner applies today."""


@dataclass(frozen=True)
class SiteEffects:
    """The effects at one entry, first to last."""

    entry: Entry
    effects: tuple[Effect, ...]
