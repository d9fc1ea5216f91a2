"""Cases of the LoRA table: batches by tokens, mix and ranks, and the bytes that each must move.

One layer's four sites make a *pass*. A pass over the same adapters again would find them in the L2 cache, as
no real step does, so passes go through copies of the layer and through other adapters of the pool, until as
many bytes lie between two uses of one as the cache holds several times over. x and y stay what they are in a
step: just written by the operation before, and warm.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from loraplex_bench.models.random_pool import random_pool
from loraplex_kernels.pool import LoraPool, LoraSite, Run

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
MIXES = ("identical", "distinct", "uniform-32", "zipf-1.5")
POOL_ADAPTERS = 64
RANK_SETS: dict[str, tuple[int, ...]] = {
    "8": (8,),
    "16": (16,),
    "64": (64,),
    "mixed 6-64": (6, 7, 8, 12, 14, 16, 32, 64),
}
COLD_BYTES = 160 << 20
MAX_PASSES = 128


@dataclass(frozen=True)
class ModelShape:
    """The linear layers of a Llama: the sizes that decide the op's cost."""

    hidden: int
    key_value: int
    intermediate: int
    layers: int

    def sites(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Site name → (in_features, widths of its slices)."""
        return {
            "qkv": (self.hidden, (self.hidden, self.key_value, self.key_value)),
            "o": (self.hidden, (self.hidden,)),
            "gate_up": (self.hidden, (self.intermediate, self.intermediate)),
            "down": (self.intermediate, (self.hidden,)),
        }


MODELS = {
    "tiny": ModelShape(hidden=64, key_value=32, intermediate=96, layers=2),
    "demo": ModelShape(hidden=192, key_value=192, intermediate=512, layers=4),
    "llama-100m": ModelShape(hidden=768, key_value=256, intermediate=2048, layers=12),
    "llama-3-1b": ModelShape(hidden=2048, key_value=512, intermediate=8192, layers=16),
    "llama-3-8b": ModelShape(hidden=4096, key_value=1024, intermediate=14336, layers=32),
}

Sites = dict[str, list[LoraSite]]
"""The sites of a layer by name, each once for every copy of the layer."""


def make_sites(shape: ModelShape) -> Sites:
    """The layers' projections among the entries of a pool, one after the other."""
    sites: Sites = {name: [] for name in shape.sites()}
    entry = 0
    for _ in range(shape.layers):
        for name, (in_features, widths) in shape.sites().items():
            slices = tuple((sum(widths[:index]), width) for index, width in enumerate(widths))
            sites[name].append(LoraSite(entry, in_features, slices))
            entry += len(widths)
    return sites


def make_pool(
    shape: ModelShape,
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scaled: bool = False,
) -> LoraPool:
    """One adapter per rank on every site of every layer. `scaled`: in 8 bits."""
    layer = [(inner, width) for inner, widths in shape.sites().values() for width in widths]
    return random_pool(layer * shape.layers, ranks, dtype, device, scaled=scaled)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    tokens: int
    mix: str
    ranks: str

    def __str__(self) -> str:
        return f"{self.model} {self.tokens} tokens, {self.mix}, rank {self.ranks}"


def cases(quick: bool = False) -> list[Case]:
    """All cases, those that the targets speak of first: what a time limit cuts off matters least."""
    big = [
        Case("llama-3-8b", tokens, mix, ranks)
        for ranks in ("16", "mixed 6-64", "8", "64")
        for tokens in sorted(TOKENS, key=lambda tokens: (tokens != 64, tokens))
        for mix in MIXES
        if not (tokens == 1 and mix != "identical")
    ]
    small = [
        Case("llama-3-1b", tokens, mix, ranks)
        for ranks in ("16", "mixed 6-64")
        for tokens in (1, 64, 1024)
        for mix in ("identical", "distinct", "zipf-1.5")
        if not (tokens == 1 and mix != "identical")
    ]
    if quick:
        return [case for case in big if case.tokens in (16, 64, 1024) and case.ranks != "64"][:12]
    # The small model's rows stand before the big one's least telling ranks.
    middle = sum(case.ranks in ("16", "mixed 6-64") for case in big)
    return [*big[:middle], *small, *big[middle:]]


def adapters_of_tokens(mix: str, tokens: int, seed: int = 0) -> list[int]:
    """The adapter of each token, of at most `POOL_ADAPTERS`, equal ones side by side as the server has them.

    "distinct" is one adapter a token, and past `POOL_ADAPTERS` tokens equal shares of all adapters.
    """
    chosen = random.Random(seed)
    if mix == "identical":
        adapters = [0] * tokens
    elif mix == "distinct":
        adapters = [token * POOL_ADAPTERS // max(tokens, POOL_ADAPTERS) for token in range(tokens)]
    elif mix == "uniform-32":
        adapters = [chosen.randrange(32) for _ in range(tokens)]
    elif mix == "zipf-1.5":
        weights = [(index + 1) ** -1.5 for index in range(POOL_ADAPTERS)]
        adapters = chosen.choices(range(POOL_ADAPTERS), weights, k=tokens)
    else:
        raise ValueError(f"mix must be one of {MIXES}, got {mix!r}")
    return sorted(adapters)


def rank_of_slot(ranks: str, slot: int) -> int:
    choices = RANK_SETS[ranks]
    return choices[slot % len(choices)]


def runs_of(slots: Sequence[int]) -> list[Run]:
    """Runs of tokens with equal slots."""
    runs: list[Run] = []
    start = 0
    for slot, tokens in groupby(slots):
        end = start + len(list(tokens))
        runs.append((start, end, ((slot, 1.0),)))
        start = end
    return runs


@dataclass(frozen=True)
class Workload:
    """The passes of one case: which copy of the layer, and the slot of each token."""

    case: Case
    passes: tuple[tuple[int, tuple[int, ...]], ...]
    bytes_per_pass: float
    """Adapters at their true ranks once, x once for a site, y read and written once."""


def workload(
    case: Case, shape: ModelShape, copies: int, itemsize: int = 2, cold_bytes: int = COLD_BYTES
) -> Workload:
    """The passes between which `cold_bytes` are read, with `copies` copies of the layer in the pool."""
    drawn = adapters_of_tokens(case.mix, case.tokens)
    dense = {adapter: index for index, adapter in enumerate(dict.fromkeys(drawn))}
    adapters, distinct = [dense[adapter] for adapter in drawn], len(dense)
    rows = sum(inner * len(widths) + sum(widths) for inner, widths in shape.sites().values())
    activations = sum(inner + 2 * sum(widths) for inner, widths in shape.sites().values())
    passes: list[tuple[int, tuple[int, ...]]] = []
    adapter_bytes = 0
    shifts = POOL_ADAPTERS // (1 << (distinct - 1).bit_length())
    # Even where all is cold at once, some passes in a row hide the launch of the graph.
    while len(passes) < min(max(4, copies), MAX_PASSES) or (
        adapter_bytes < cold_bytes and len(passes) < min(copies * shifts, MAX_PASSES)
    ):
        copy, shift = len(passes) % copies, len(passes) // copies % shifts
        slots = tuple((slot + shift * (POOL_ADAPTERS // shifts)) % POOL_ADAPTERS for slot in adapters)
        adapter_bytes += itemsize * rows * sum(rank_of_slot(case.ranks, slot) for slot in set(slots))
        passes.append((copy, slots))
    activation_bytes = itemsize * activations * case.tokens
    return Workload(case, tuple(passes), adapter_bytes / len(passes) + activation_bytes)


@dataclass(frozen=True)
class Layers:
    """Copies of one layer of a model, with `POOL_ADAPTERS` adapters each.

    `scaled` holds them in 8 bits; their values are then random bytes.
    """

    model: str
    ranks: str
    pool: LoraPool
    sites: Sites

    @property
    def copies(self) -> int:
        return len(next(iter(self.sites.values())))

    @property
    def max_rank(self) -> int:
        return max(RANK_SETS[self.ranks])


def make_layers(
    model: str, ranks: str, copies: int, dtype: torch.dtype, device: torch.device, scaled: bool = False
) -> Layers:
    shape = MODELS[model]
    of_slot = [rank_of_slot(ranks, slot) for slot in range(POOL_ADAPTERS)]
    layer = ModelShape(shape.hidden, shape.key_value, shape.intermediate, copies)
    pool = make_pool(layer, of_slot, dtype, device, scaled=scaled)
    return Layers(model, ranks, pool, make_sites(layer))


Activations = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""x ``[tokens, in]`` and y ``[tokens, out]`` of each site."""


def activations(shape: ModelShape, tokens: int, dtype: torch.dtype, device: torch.device) -> Activations:
    """Random ones."""
    return {
        name: (
            torch.randn(tokens, inner, dtype=torch.float32, device=device).to(dtype),
            torch.randn(tokens, sum(widths), dtype=torch.float32, device=device).to(dtype),
        )
        for name, (inner, widths) in shape.sites().items()
    }
