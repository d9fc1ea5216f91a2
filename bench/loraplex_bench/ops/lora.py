"""The LoRA op of a layer beside its peers, and beside the base product of the same sites.

- `lora`        tokens x mixes x ranks, all sites of a layer a call, adapters cold (see `lora_cases`)
- `lora-share`  what adapters add to a step: to each site, to a prefill, to a decode of 64 adapters in 16 and
                in 8 bits
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from loraplex_bench.ops.lora_cases import (
    COLD_BYTES,
    MODELS,
    RANK_SETS,
    Activations,
    Case,
    ModelShape,
    Workload,
    activations,
    cases,
    make_layers,
    make_pool,
    make_sites,
    workload,
)
from loraplex_bench.ops.lora_contenders import PEERS, LoraOp, OwnKernels, Reference
from loraplex_bench.ops.registry import Contender, Last, Op, Results, Setting, unavailable
from loraplex_bench.ops.timers import Call
from loraplex_kernels import lora
from loraplex_kernels.lora import reference
from loraplex_kernels.pool import LoraBatch, LoraBatchBuffers, Run

COPIES = 4
"""Copies of the layer: with all adapters of rank 8 that is 340 MB, seven times an H100's cache."""

MIXED_RANKS = (4, 6, 7, 8, 12, 14, 16, 32)


def passes(op: LoraOp, work: Workload, data: Activations) -> list[Call]:
    """A call for each pass of `work`, over all sites; what may synchronise is done here."""
    prepared = {slots: op.prepare(slots) for slots in dict.fromkeys(slots for _, slots in work.passes)}

    def call(copy: int, slots: tuple[int, ...]) -> None:
        for name, (x, y) in data.items():
            op.apply(x, y, name, copy, prepared[slots])

    return [functools.partial(call, copy, slots) for copy, slots in work.passes]


def deltas(op: LoraOp, work: Workload, data: Activations) -> Results:
    """The deltas that the first pass adds at each site."""
    copy, slots = work.passes[0]
    batch = op.prepare(slots)
    found = []
    for name, (x, y) in data.items():
        found.append(torch.zeros_like(y))
        op.apply(x, found[-1], name, copy, batch)
    return found


class _Contest:
    """All contenders with the weights of one model and set of ranks; padded copies of them are large."""

    def __init__(self, model: str, ranks: str, setting: Setting) -> None:
        self.layers = make_layers(model, ranks, COPIES, setting.dtype, setting.device)
        self.peers: dict[str, LoraOp | Exception] = {}
        for make in PEERS:
            name = str(getattr(make, "name", make))
            try:
                self.peers[name] = make(self.layers)
            except Exception as problem:
                self.peers[name] = problem


_contest = Last(_Contest)


def prepare(case: Case, setting: Setting) -> Iterator[Contender]:
    """This project's kernels, and the peers that are at hand."""
    contest = _contest(case.model, case.ranks, setting)
    shape = MODELS[case.model]
    cold_bytes = min(setting.cold_bytes, COLD_BYTES)
    work = workload(case, shape, COPIES, setting.dtype.itemsize, cold_bytes)
    data = activations(shape, case.tokens, setting.dtype, setting.device)
    # Once for all contenders: it goes adapter by adapter.
    truth = functools.cache(functools.partial(deltas, Reference(contest.layers), work, data))
    for name, op in {OwnKernels.name: OwnKernels(contest.layers), **contest.peers}.items():
        if isinstance(op, Exception):
            yield unavailable(name, op)
            continue
        yield Contender(
            name,
            functools.partial(passes, op, work, data),
            functools.partial(deltas, op, work, data),
            truth,
            least_bytes=work.bytes_per_pass,
            role="own" if name == OwnKernels.name else "peer",
        )


@dataclass(frozen=True)
class Share:
    """A batch of `tokens` tokens spread evenly over `adapters` adapters, of ranks in turn.

    Attributes:
        site: one of a layer's, or "all".
        layers: of the model, each with adapters of its own; a call is one of them.
        scaled: adapters in 8 bits.
    """

    model: str
    tokens: int
    adapters: int
    ranks: tuple[int, ...]
    site: str = "all"
    layers: int = 2
    scaled: bool = False

    def __str__(self) -> str:
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else "mixed ranks"
        bits = ", 8 bits" if self.scaled else ""
        return f"{self.model} {self.site}, {self.tokens} tokens, {self.adapters} adapters, {ranks}{bits}"


def gpu_shares() -> list[Share]:
    """A whole decode step of a Llama-3-8B in which every token has its own adapter, and a prefill."""
    layers = MODELS["llama-3-8b"].layers
    return [
        *(
            Share("llama-3-8b", tokens=64, adapters=64, ranks=(16,), layers=layers, scaled=scaled)
            for scaled in (False, True)
        ),
        Share("llama-3-8b", tokens=4096, adapters=8, ranks=(16,)),
        *_sites("llama-3-8b", ((64, 64),)),
    ]


def cpu_shares() -> list[Share]:
    """The small models site by site."""
    mixes = ((8, 8), (32, 1), (32, 16), (32, 32), (256, 1), (256, 4))
    return [*_sites("demo", mixes), *_sites("llama-100m", mixes)]


def _sites(model: str, mixes: tuple[tuple[int, int], ...]) -> Iterator[Share]:
    for tokens, adapters in mixes:
        for site in (*MODELS[model].sites(), "all"):
            yield Share(model, tokens, adapters, MIXED_RANKS, site, MODELS[model].layers)


def prepare_share(case: Share, setting: Setting) -> Iterator[Contender]:
    """The op, and the dense product of the same sites, which computes something else."""
    whole = MODELS[case.model]
    shape = ModelShape(whole.hidden, whole.key_value, whole.intermediate, case.layers)
    ranks = [case.ranks[slot % len(case.ranks)] for slot in range(case.adapters)]
    pool = make_pool(shape, ranks, setting.dtype, setting.device, scaled=case.scaled)
    sites = make_sites(shape)
    data = activations(shape, case.tokens, setting.dtype, setting.device)
    if case.site != "all":
        data = {case.site: data[case.site]}
    batch = _batch(case, setting.device)

    def layer(index: int) -> None:
        for name, (x, y) in data.items():
            lora.apply(x, y, pool, sites[name][index], batch)

    def first(apply: Callable[..., None]) -> Results:
        found = {name: torch.zeros_like(y) for name, (_, y) in data.items()}
        for name, y in found.items():
            apply(data[name][0], y, pool, sites[name][0], batch)
        return list(found.values())

    moved = sum(x.nbytes + 2 * y.nbytes for x, y in data.values())
    rows = sum(
        inner * len(widths) + sum(widths) for name, (inner, widths) in shape.sites().items() if name in data
    )
    yield Contender(
        "loraplex",
        lambda: [functools.partial(layer, index) for index in range(case.layers)],
        lambda: first(lora.apply),
        lambda: first(reference.apply),
        least_bytes=rows * sum(ranks) * pool.arena.itemsize + moved,
        role="own",
        note=f"{case.layers} layers",
    )
    yield Contender("base product", functools.partial(_base_products, data, setting))


def _batch(case: Share, device: torch.device) -> LoraBatch:
    bounds = [case.tokens * index // case.adapters for index in range(case.adapters + 1)]
    runs: list[Run] = [(start, end, ((slot, 1.0),)) for slot, (start, end) in enumerate(pairwise(bounds))]
    buffers = LoraBatchBuffers(
        max_tokens=case.tokens,
        max_pairs=case.tokens,
        max_segments=case.adapters,
        device=device,
        fixed_grid=True,
    )
    return buffers.fill(runs)


def _base_products(data: Activations, setting: Setting) -> list[Call]:
    """The layer's dense products, with so many copies of the weights that they are cold."""
    one = sum(x.shape[1] * y.shape[1] for x, y in data.values()) * setting.dtype.itemsize
    weights = [
        [torch.randn(y.shape[1], x.shape[1], device=x.device, dtype=x.dtype) * 0.02 for x, y in data.values()]
        for _ in range(setting.copies(one))
    ]

    def layer(of_sites: list[torch.Tensor]) -> None:
        for weight, (x, _) in zip(of_sites, data.values(), strict=True):
            torch.nn.functional.linear(x, weight)

    return [functools.partial(layer, of_sites) for of_sites in weights]


def _ranks_alike(case: Case) -> str:
    return "same ranks" if len(RANK_SETS[case.ranks]) == 1 else "mixed ranks"


TINY = [Case("tiny", 5, mix="distinct", ranks="8"), Case("tiny", 20, mix="zipf-1.5", ranks="mixed 6-64")]
TINY_SHARES = [
    *(Share("tiny", tokens=8, adapters=4, ranks=(8,), scaled=scaled) for scaled in (False, True)),
    *_sites("tiny", ((6, 3),)),
]
OPS = (
    Op("lora-share", {"cuda": gpu_shares, "cpu": cpu_shares}, TINY_SHARES, prepare_share),
    Op("lora", {"cuda": cases}, TINY, prepare, group=_ranks_alike),
)
