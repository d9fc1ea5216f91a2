"""The manifest of an adapter: what it is and does, without its weights."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from loraplex_kernels.pool import Bottleneck as BottleneckForm
from loraplex_kernels.pool import EntryShape, VectorKind, VectorShape
from loraplex_server.adapters.spec.declared import (
    LINEAR,
    BiasSpec,
    BottleneckSpec,
    EffectSpec,
    InputScaleSpec,
    LoraSpec,
    MagnitudeSpec,
    OutputScaleSpec,
    OwnWeightSpec,
    PrefixSpec,
    SiteSpec,
    SoftPromptSpec,
    TokenRowsSpec,
)
from loraplex_server.adapters.spec.sites import Entry, SiteKind
from loraplex_server.adapters.spec.tensors import TensorFileHeader, TensorInfo
from loraplex_server.core.adapter_files import WEIGHTS_FILE
from loraplex_server.core.tokenizer_source import TokenizerSource


@dataclass(frozen=True)
class AdapterManifest:
    """A checked adapter.

    Attributes:
        folder: real path of the folder it was read from.
        peft_type: PEFT's name of the method, "LORA", "IA3" …, or "BOTTLENECK" for AdapterHub's.
        config: canonical text of the configuration.
        header: the weight file's header; the weights are read only while it stays the same.
        sites: effects by entry, ascending.
        prompt: what stands before every prompt.
        invocation_tokens: where an activated LoRA begins to apply; empty for everywhere.
        added_tokens: how many token ids it adds to the base's vocabulary.
        base_tables: tables of the vocabulary in its file that are the base's own, with their places.
        bottleneck: the form of its networks, if it is a bottleneck adapter.
        weights_file: name of the file that the header is of.
        chat_template: jinja source that the adapter was trained with; "" where it brings none.
        tokenizer: that the adapter was trained with; None where it brings none.
        kind: the same object for all that differ in nothing but name, folder, what they bring for text, and
            weights.
    """

    name: str
    folder: Path
    peft_type: str
    config: str
    header: TensorFileHeader
    sites: tuple[SiteSpec, ...]
    prompt: SoftPromptSpec | PrefixSpec | None = None
    invocation_tokens: tuple[int, ...] = ()
    added_tokens: int = 0
    base_tables: tuple[tuple[Entry, TensorInfo], ...] = ()
    bottleneck: BottleneckForm | None = None
    weights_file: str = WEIGHTS_FILE
    chat_template: str = ""
    tokenizer: TokenizerSource | None = None
    kind: Kind | None = field(default=None, repr=False, compare=False)

    @property
    def num_virtual_tokens(self) -> int:
        match self.prompt:
            case SoftPromptSpec(tensor) | PrefixSpec(tensor):
                return tensor.shape[0]
        return 0

    @property
    def num_prefix_tokens(self) -> int:
        """Virtual tokens whose keys and values it brings itself."""
        return self.num_virtual_tokens if isinstance(self.prompt, PrefixSpec) else 0

    @property
    def pairs(self) -> tuple[tuple[Entry, LoraSpec], ...]:
        """Every low-rank pair with its entry."""
        return tuple(
            (site.entry, effect)
            for site in self.sites
            for effect in site.effects
            if isinstance(effect, LoraSpec)
        )

    @cached_property
    def rank(self) -> int:
        """Largest rank over its entries, 0 for a method without ranks."""
        if self.kind is not None:
            return self.kind.first.rank
        return max((pair.rank for _, pair in self.pairs), default=0)

    @cached_property
    def linear(self) -> bool:
        """True if what it adds can be weighted, and added to what other adapters add."""
        if self.kind is not None:
            return self.kind.first.linear
        effects = [effect for site in self.sites for effect in site.effects]
        return self.prompt is None and all(isinstance(effect, LINEAR) for effect in effects)

    @cached_property
    def target_modules(self) -> tuple[str, ...]:
        """Last names of the modules it acts on, sorted."""
        if self.kind is not None:
            return self.kind.first.target_modules
        return tuple(sorted({site.entry.path.rpartition(".")[2] for site in self.sites}))

    @property
    def shapes(self) -> tuple[EntryShape, ...]:
        """Its pairs as the pool lays them out."""
        return tuple(
            EntryShape(entry.index, entry.in_features, entry.out_features, pair.rank)
            for entry, pair in self.pairs
        )

    @property
    def vectors(self) -> tuple[VectorShape, ...]:
        """Its vectors as the pool lays them out."""
        match self.prompt:
            case SoftPromptSpec(tensor):
                return (VectorShape(0, VectorKind.SOFT_PROMPT, tensor.shape[1], tensor.shape[0]),)
            case PrefixSpec(tensor, length):
                rows = tensor.shape[0] * (tensor.shape[1] // length)
                return (VectorShape(0, VectorKind.PREFIX, length, rows),)
        return tuple(
            vector
            for site in self.sites
            for effect in site.effects
            for vector in _vectors(site.entry, effect)
        )


def _vectors(entry: Entry, effect: EffectSpec) -> tuple[VectorShape, ...]:
    index, out_features = entry.index, entry.out_features
    match effect:
        case InputScaleSpec():
            return (VectorShape(index, VectorKind.INPUT_SCALE, entry.in_features),)
        case OutputScaleSpec():
            return (VectorShape(index, VectorKind.OUTPUT_SCALE, out_features),)
        case MagnitudeSpec():
            scale = VectorShape(index, VectorKind.OUTPUT_SCALE, out_features)
            # The base's bias is not scaled: what the scale takes from it, a bias gives back.
            return (scale, VectorShape(index, VectorKind.BIAS, out_features)) if entry.has_bias else (scale,)
        case BiasSpec():
            return (VectorShape(index, VectorKind.BIAS, out_features),)
        case OwnWeightSpec(weight, bias):
            rows = 1 if entry.kind is SiteKind.NORM else weight.shape[0]
            own = VectorShape(index, VectorKind.WEIGHT, weight.shape[-1], rows)
            return (own,) if bias is None else (own, VectorShape(index, VectorKind.WEIGHT_BIAS, out_features))
        case TokenRowsSpec(tokens):
            hidden = entry.out_features if entry.kind is SiteKind.EMBEDDING else entry.in_features
            return (VectorShape(index, VectorKind.TOKEN_ROWS, hidden, len(tokens), tokens),)
        case BottleneckSpec(down):
            width, hidden = down.shape
            return (
                VectorShape(index, VectorKind.DOWN, hidden, width),
                VectorShape(index, VectorKind.DOWN_BIAS, width),
                VectorShape(index, VectorKind.UP, hidden, width),
                VectorShape(index, VectorKind.UP_BIAS, hidden),
            )
        case LoraSpec():
            return ()


class Kind:
    """The part that adapters of equal configuration and header share; lives as long as one of them."""

    def __init__(self, first: AdapterManifest) -> None:
        self.first = first


KnownKinds = MutableMapping[bytes, Kind]
"""Kinds by digest of configuration and header, of one registry and largest rank."""
