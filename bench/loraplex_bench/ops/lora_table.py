"""Times the LoRA op of one layer against its peers on the GPU: CUDA graphs, cold adapters, one process.

Every contender does the four sites of a layer, pass after pass (see `lora_cases`), inside one captured graph;
its time is the median replay over the passes. The share of the roofline is the time that the case's bytes
take at the rate of a large copy on this card, over the time measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraplex_bench.ops.lora_cases import (
    MIXES,
    RANK_SETS,
    TOKENS,
    Case,
    Layers,
    Workload,
    make_layers,
    workload,
)
from loraplex_bench.ops.lora_peers import PEERS, Peer, PeerUnavailableError
from loraplex_bench.ops.ops_lora import MODELS, ModelShape, make_pool
from loraplex_kernels import dispatch, lora
from loraplex_kernels.pool import LoraBatchBuffers, Run

COPIES = 4
"""Copies of the layer: with all adapters of rank 8 that is 340 MB, seven times an H100's cache."""

REPLAYS = 7
TOLERANCE = 2e-2
OWN = "loraplex"


@dataclass(frozen=True)
class Row:
    """One case: microseconds a layer by contender, or why there are none."""

    case: Case
    bytes_per_layer: float
    us: dict[str, float]
    not_run: dict[str, str] = field(default_factory=dict)

    def share(self, ceiling: float) -> float:
        """Of the byte roofline at `ceiling` bytes a second."""
        return self.bytes_per_layer / ceiling / (self.us[OWN] * 1e-6)

    def speedup(self, peer: str) -> float | None:
        return self.us[peer] / self.us[OWN] if peer in self.us and OWN in self.us else None


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


def copy_ceiling(device: torch.device, size: int = 1 << 31) -> float:
    """Bytes a second of a large device-to-device copy, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    seconds = min(_event_seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * size / seconds


def graph_seconds(run: Callable[[], object], replays: int = REPLAYS) -> float:
    """Median seconds of one replay of `run` captured as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    graph.replay()
    return statistics.median(_event_seconds(graph.replay) for _ in range(replays))


def _event_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def activations(shape: ModelShape, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """x and y of each site."""
    return {
        name: (
            torch.randn(tokens, inner, dtype=torch.float32, device=device).to(dtype),
            torch.randn(tokens, sum(widths), dtype=torch.float32, device=device).to(dtype),
        )
        for name, (inner, widths) in shape.sites().items()
    }


def passes(peer: Peer, work: Workload, shape: ModelShape, data: dict[str, Any]) -> Callable[[], None]:
    """A function that does all passes of `work`; what may synchronise is done here."""
    prepared: dict[tuple[int, ...], Any] = {}
    for _, slots in work.passes:
        if slots not in prepared:
            prepared[slots] = peer.prepare(slots)

    def run() -> None:
        for copy, slots in work.passes:
            for name in shape.sites():
                x, y = data[name]
                peer.apply(x, y, name, copy, prepared[slots])

    return run


def agrees(peer: Peer, own: Peer, work: Workload, data: dict[str, Any]) -> bool:
    """Whether a peer computes what this project's op does, at every site, within what rounding explains."""
    copy, slots = work.passes[0]
    for name, (x, y) in data.items():
        deltas: list[Tensor] = []
        for contender in (own, peer):
            out = torch.zeros_like(y)
            contender.apply(x, out, name, copy, contender.prepare(slots))
            deltas.append(out.double())
        if not float((deltas[1] - deltas[0]).norm()) <= TOLERANCE * float(deltas[0].norm()):
            return False
    return True


class Contenders:
    """All peers with the weights of one model and set of ranks; built once, since padded copies are large."""

    def __init__(self, model: str, ranks: str, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.ranks, self.dtype, self.device = model, ranks, dtype, device
        self.layers: Layers = make_layers(model, ranks, COPIES, dtype, device)
        self.peers: list[Peer] = []
        self.not_run: dict[str, str] = {}
        shape = MODELS[model]
        check = workload(Case(model, 64, "uniform-32", ranks), shape, COPIES, dtype.itemsize)
        data = activations(shape, 64, dtype, device)
        for make in PEERS:
            name = str(getattr(make, "name", make))
            try:
                peer = make(self.layers)
                if self.peers and not agrees(peer, self.peers[0], check, data):
                    raise PeerUnavailableError("its result is not this project's")
                self.peers.append(peer)
            except (PeerUnavailableError, RuntimeError) as error:
                self.not_run[name] = _reason(error)

    def measure(self, case: Case) -> Row:
        """Times every contender on `case`."""
        shape = MODELS[case.model]
        work = workload(case, shape, COPIES, self.dtype.itemsize)
        data = activations(shape, case.tokens, self.dtype, self.device)
        us: dict[str, float] = {}
        not_run = dict(self.not_run)
        for peer in self.peers:
            try:
                seconds = graph_seconds(passes(peer, work, shape, data))
                us[peer.name] = seconds / len(work.passes) * 1e6
            except (PeerUnavailableError, RuntimeError) as error:
                not_run[peer.name] = _reason(error)
        return Row(case, work.bytes_per_pass, us, not_run)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def measure_all(
    wanted: Iterable[Case], dtype: torch.dtype, device: torch.device, deadline: float
) -> Iterator[Row]:
    """Rows in the order of `wanted`, until `deadline` (`time.monotonic`); each as soon as it is there."""
    contenders: Contenders | None = None
    for case in wanted:
        if time.monotonic() > deadline:
            return
        if contenders is None or (contenders.model, contenders.ranks) != (case.model, case.ranks):
            contenders = None
            torch.cuda.empty_cache()
            contenders = Contenders(case.model, case.ranks, dtype, device)
        yield contenders.measure(case)


def summary(rows: Sequence[Row], ceiling: float) -> dict[str, float]:
    """Geometric means of the ratios to each peer, over all rows and over those of mixed ranks."""
    found: dict[str, float] = {}
    for peer in {name for row in rows for name in row.us} - {OWN}:
        for label, chosen in (
            (f"{peer}, same ranks", [row for row in rows if len(RANK_SETS[row.case.ranks]) == 1]),
            (f"{peer}, mixed ranks", [row for row in rows if len(RANK_SETS[row.case.ranks]) > 1]),
        ):
            ratios = [ratio for row in chosen if (ratio := row.speedup(peer))]
            if ratios:
                found[label] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    shares = [row.share(ceiling) for row in rows if OWN in row.us]
    if shares:
        found["largest share of the roofline"] = max(shares)
    return found


@dataclass(frozen=True)
class Step:
    """LoRA alone over a whole model, in one graph."""

    label: str
    ms: float
    floor_ms: float
    """The adapters' and activations' bytes at the copy's rate."""


def whole_step(
    model: str, tokens: int, rank: int, ceiling: float, device: torch.device, *, scaled: bool = False
) -> Step:
    """Every token its own adapter of rank `rank`, every site of every layer once."""
    shape = MODELS[model]
    pool, sites = make_pool(shape, [rank] * tokens, torch.bfloat16, device, scaled=scaled)
    buffers = LoraBatchBuffers(max_tokens=tokens, max_pairs=tokens, device=device, fixed_grid=True)
    batch = buffers.fill([(token, token + 1, ((token, 1.0),)) for token in range(tokens)])
    data = activations(shape, tokens, torch.bfloat16, device)

    def run() -> None:
        for layer in range(shape.layers):
            for name, (x, y) in data.items():
                lora.apply(x, y, pool, sites[name][layer], batch)

    per_token = sum(inner + 2 * sum(widths) for inner, widths in shape.sites().values())
    size = pool.arena.numel() * pool.arena.itemsize + 2 * shape.layers * tokens * per_token
    label = f"{model}, {tokens} tokens, {tokens} distinct adapters of rank {rank}"
    return Step(label + (" in 8 bits" if scaled else ""), graph_seconds(run) * 1e3, size / ceiling * 1e3)


@dataclass(frozen=True)
class PrefillShare:
    """LoRA beside the dense bf16 product of the same sites, microseconds a layer."""

    tokens: int
    adapters: int
    rank: int
    lora_us: float
    dense_us: float


def prefill_share(
    model: str, tokens: int, adapters: int, rank: int, device: torch.device, copies: int = 2
) -> PrefillShare:
    """A prefill of `tokens` tokens, spread evenly over `adapters` adapters."""
    shape = MODELS[model]
    layer = ModelShape(shape.hidden, shape.key_value, shape.intermediate, copies)
    pool, sites = make_pool(layer, [rank] * adapters, torch.bfloat16, device)
    share = tokens // adapters
    runs: list[Run] = [(slot * share, (slot + 1) * share, ((slot, 1.0),)) for slot in range(adapters)]
    batch = LoraBatchBuffers(
        max_tokens=tokens, max_pairs=tokens, max_segments=adapters, device=device, fixed_grid=True
    ).fill(runs)
    data = activations(shape, tokens, torch.bfloat16, device)
    weights = {
        name: [
            torch.randn(sum(widths), inner, device=device, dtype=torch.bfloat16) * 0.02 for _ in range(copies)
        ]
        for name, (inner, widths) in shape.sites().items()
    }

    def run_lora() -> None:
        for copy in range(copies):
            for name, (x, y) in data.items():
                lora.apply(x, y, pool, sites[name][copy], batch)

    def run_dense() -> None:
        for copy in range(copies):
            for name, (x, _) in data.items():
                torch.nn.functional.linear(x, weights[name][copy])

    return PrefillShare(
        tokens,
        adapters,
        rank,
        graph_seconds(run_lora) / copies * 1e6,
        graph_seconds(run_dense) / copies * 1e6,
    )


def empty_step_launches(device: torch.device) -> int:
    """Launches of the op over a model where no token has an adapter, called as the server does."""
    pool, sites = make_pool(MODELS["llama-3-1b"], [8], torch.bfloat16, device)
    data = activations(MODELS["llama-3-1b"], 64, torch.bfloat16, device)
    batch = LoraBatchBuffers(max_tokens=64, max_pairs=64, device=device).fill([(0, 64, ())])
    before = sum(dispatch.launches.values())
    for name, of_layers in sites.items():
        for site in of_layers:
            if batch.num_pairs:
                x, y = data[name]
                lora.apply(x, y, pool, site, batch)
    return sum(dispatch.launches.values()) - before


def as_json(row: Row, ceiling: float) -> dict[str, Any]:
    """A row with what follows from it."""
    found = {**asdict(row.case), "bytes_per_layer": row.bytes_per_layer, "us": row.us, "not_run": row.not_run}
    if OWN in row.us:
        found["gb_per_s"] = row.bytes_per_layer / row.us[OWN] / 1e3
        found["roofline_share"] = row.share(ceiling)
        found["ratio"] = {peer: row.speedup(peer) for peer in row.us if peer != OWN}
    return found
