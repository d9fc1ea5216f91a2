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
    """Where a projection is.

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


@dataclass(frozen=True)
class Entry:
    """One projection as the adapter pool numbers it.

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

    @property
    def path(self) -> str:
        return self.address.path


class Part(enum.StrEnum):
    """What a tensor of a PEFT file is, by the end of its name.

    A is `[rank, in_features]`, B `[out_features, rank]`, BIAS (of B) and MAGNITUDE `[out_features]`; IA3 is
    `[1, in_features]` on a feed-forward's input, else `[out_features, 1]`.
    """

    A = "lora_A.weight"
    B = "lora_B.weight"
    BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    IA3 = "ia3_l"


class SiteRegistry:
    """Every entry of one base model, in the order of the pool's tables.

    Args:
        sites: (module path, in_features, out_features) of each entry, in the order of its index.
        biased: paths at which the base has a bias.
        sharing: paths whose input feeds other projections as well.
        hidden_size: width of the embeddings.
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
        kv_shapes: Iterable[tuple[int, int]] = (),
        model_type: str = "",
        residual: Mapping[str, str] | None = None,
    ) -> None:
        self.hidden_size = hidden_size
        self.kv_shapes = tuple(kv_shapes)
        self.model_type = model_type
        self.residual = dict(residual or {})
        entries = []
        for index, (path, in_features, out_features) in enumerate(sites):
            if in_features < 1 or out_features < 1:
                raise ValueError(f"{path} has an empty shape: {in_features} to {out_features}")
            address = SiteAddress(_layer_of(path), path)
            entries.append(Entry(index, address, in_features, out_features, path in biased, path in sharing))
        self.entries: tuple[Entry, ...] = tuple(entries)
        self._by_path = {entry.path: entry for entry in entries}
        if len(self._by_path) != len(entries):
            raise ValueError("two entries have the same path")
        self._located = {
            f"{_PEFT_PREFIX}{entry.path}.{part}": (entry, part) for entry in entries for part in Part
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

    @property
    def row_lengths(self) -> frozenset[int]:
        """Every length that a rank row may have: the inputs and outputs of all entries."""
        lengths = {n for entry in self.entries for n in (entry.in_features, entry.out_features)}
        return frozenset(lengths | ({self.hidden_size} if self.hidden_size else set()))


def _layer_of(path: str) -> int:
    match = _LAYER.search(path)
    return int(match.group(1)) if match else -1
