"""The places of the base model that an adapter may act on, and how PEFT's tensor names find them."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

_PEFT_PREFIX = "base_model.model."
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, order=True)
class SiteAddress:
    """The address of a projection.

    Attributes:
        layer: index of the decoder layer, -1 outside of them.
        path: module path as in the transformers model, "model.layers.0.self_attn.q_proj".
        slice: which part of a projection whose output parts have adapters of their own.
        expert: which expert of a stacked parameter.
        shard: which tensor-parallel shard.
    """

    layer: int
    path: str
    slice: int = 0
    expert: int = 0
    shard: int = 0


class SiteKind(enum.Enum):
    """The kinds of places. The embedding maps a one-hot token to the hidden size."""

    PROJECTION = "projection"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"


@dataclass(frozen=True)
class Entry:
    """One place as the adapter pool numbers it.

    Attributes:
        has_bias: the base adds a bias of its own there.
        shares_input: other projections are computed from the same input, in one product.
    """

    index: int
    address: SiteAddress
    in_features: int
    out_features: int
    has_bias: bool = False
    shares_input: bool = False
    kind: SiteKind = SiteKind.PROJECTION

    @property
    def path(self) -> str:
        return self.address.path


class Part(enum.StrEnum):
    """Parts of an adapter at a place, by the ends of tensors' names in a PEFT file.

    A is `[rank, in_features]`, B `[out_features, rank]`, BIAS (of B) and MAGNITUDE `[out_features]`; IA3 is
    `[1, in_features]` on a feed-forward's input, else `[out_features, 1]`. WEIGHT and WEIGHT_BIAS take the
    place of the base's, BASE lies under a pair or under the rows of TOKENS, `[tokens, hidden]`. UNUSED is
    written by PEFT and has no effect while the adapter is active.
    """

    A = "lora_A.weight"
    B = "lora_B.weight"
    BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    IA3 = "ia3_l"
    WEIGHT = "weight"
    WEIGHT_BIAS = "bias"
    BASE = "base_layer.weight"
    TOKENS = "trainable_tokens_delta"
    UNUSED = "unused"


_WHOLE = {"weight": Part.WEIGHT, "bias": Part.WEIGHT_BIAS}
_LORA = {part.value: part for part in (Part.A, Part.B, Part.BIAS, Part.MAGNITUDE)}
_ROWS = {
    "base_layer.weight": Part.BASE,
    "token_adapter.base_layer.weight": Part.BASE,
    "trainable_tokens_delta": Part.TOKENS,
    "token_adapter.trainable_tokens_delta": Part.TOKENS,
    "modules_to_save.weight": Part.UNUSED,
    "original_module.weight": Part.UNUSED,
}
_EMBEDDING_LORA = {
    "lora_embedding_A": Part.A,
    "lora_embedding_B": Part.B,
    "lora_magnitude_vector": Part.MAGNITUDE,
}
_ENDINGS: dict[SiteKind, dict[str, Part]] = {
    SiteKind.PROJECTION: {**_LORA, "ia3_l": Part.IA3, **_WHOLE},
    SiteKind.NORM: {**_WHOLE, **{f"ln_tuning_layers.{name}": part for name, part in _WHOLE.items()}},
    SiteKind.EMBEDDING: {**_EMBEDDING_LORA, **_ROWS, "weight": Part.WEIGHT},
    SiteKind.HEAD: {**_LORA, **_ROWS, **_WHOLE},
}


class SiteRegistry:
    """Every entry of one base model, in the order of the pool's tables.

    Args:
        sites: (module path, in_features, out_features) of each projection, in the order of its index.
        biased: paths at which the base has a bias.
        sharing: paths whose input feeds other projections as well.
        hidden_size: width of the embeddings.
        norms: (module path, width) of each norm; their entries follow.
        embedding: path of the input embeddings, whose entry follows, if there is one.
        head: path of the output embeddings, whose entry is the last, if there is one.
        vocabulary: rows of either.
        tied: the two are one table.
        kv_shapes: (KV heads, head_dim) of each layer's cache.
        model_type: transformers' name of the architecture.
        residual: path of the projection that ends attention or MLP, to that of the norm that begins it.

    Raises:
        ValueError: a path comes twice or a width is not positive.
    """

    def __init__(
        self,
        sites: Iterable[tuple[str, int, int]],
        *,
        biased: Collection[str] = (),
        sharing: Collection[str] = (),
        hidden_size: int = 0,
        norms: Iterable[tuple[str, int]] = (),
        embedding: str | None = None,
        head: str | None = None,
        vocabulary: int = 0,
        tied: bool = False,
        kv_shapes: Iterable[tuple[int, int]] = (),
        model_type: str = "",
        residual: Mapping[str, str] | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.kv_shapes = tuple(kv_shapes)
        self.vocabulary = vocabulary
        self.tied = tied
        places = [(*site, SiteKind.PROJECTION) for site in sites]
        places += [(path, width, width, SiteKind.NORM) for path, width in norms]
        if embedding is not None:
            places.append((embedding, vocabulary, hidden_size, SiteKind.EMBEDDING))
        if head is not None:
            places.append((head, hidden_size, vocabulary, SiteKind.HEAD))
        self.model_type = model_type
        self.residual = dict(residual or {})
        entries = []
        for index, (path, in_features, out_features, kind) in enumerate(places):
            if in_features < 1 or out_features < 1:
                raise ValueError(f"{path} has an empty shape: {in_features} to {out_features}")
            address = SiteAddress(_layer_of(path), path)
            entries.append(
                Entry(index, address, in_features, out_features, path in biased, path in sharing, kind)
            )
        self.entries: tuple[Entry, ...] = tuple(entries)
        self._by_path = {entry.path: entry for entry in entries}
        if len(self._by_path) != len(entries):
            raise ValueError("two entries have the same path")
        self._located = {
            f"{_PEFT_PREFIX}{entry.path}.{ending}": (entry, part)
            for entry in entries
            for ending, part in _ENDINGS[entry.kind].items()
        }

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def entry(self, path: str) -> Entry | None:
        """The entry of the module at `path`, or None where adapters cannot act."""
        return self._by_path.get(path)

    def locate(self, tensor_name: str) -> tuple[Entry, Part] | None:
        """The entry that a tensor of a PEFT file belongs to, and as what; None for any other tensor."""
        return self._located.get(tensor_name)

    def of_kind(self, kind: SiteKind) -> tuple[Entry, ...]:
        """The entries of one kind, ascending."""
        return tuple(entry for entry in self.entries if entry.kind is kind)

    @property
    def row_lengths(self) -> frozenset[int]:
        """Every length that rows are aligned by: the inputs and outputs of all projections and norms.

        Not the vocabulary: extents would begin at its multiples, for the sake of one row in a thousand.
        """
        aligned = [e for e in self.entries if e.kind in (SiteKind.PROJECTION, SiteKind.NORM)]
        lengths = {n for entry in aligned for n in (entry.in_features, entry.out_features)}
        return frozenset(lengths | ({self.hidden_size} if self.hidden_size else set()))


def _layer_of(path: str) -> int:
    match = _LAYER.search(path)
    return int(match.group(1)) if match else -1
