"""Time the LoRA op against the base matmul of the same site.

    python -m loraplex_bench.ops.ops_lora                                  on this CPU
    python -m loraplex_bench.ops.ops_lora --device cuda --dtype bfloat16 --model llama-3-8b

Every layer has adapters and base weights of its own, so a pass over the layers reads them from memory as a
forward pass does. On CUDA a pass is replayed as a graph. Times are the best of `--repeats` passes, per site
and summed over the layers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from loraplex_kernels import lora
from loraplex_kernels.pool import (
    ALIGNMENT,
    EntryShape,
    LoraBatchBuffers,
    LoraPool,
    LoraSite,
    Run,
    adapter_layout,
    extent_alignment,
)


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
    "demo": ModelShape(hidden=192, key_value=192, intermediate=512, layers=4),
    "llama-100m": ModelShape(hidden=768, key_value=256, intermediate=2048, layers=12),
    "llama-3-1b": ModelShape(hidden=2048, key_value=512, intermediate=8192, layers=16),
    "llama-3-8b": ModelShape(hidden=4096, key_value=1024, intermediate=14336, layers=32),
}
RANKS = (4, 6, 7, 8, 12, 14, 16, 32)


@dataclass(frozen=True)
class Timing:
    """One row of the table, in microseconds per site; `site` "all" is the sum over all layers' sites."""

    model: str
    tokens: int
    adapters: int
    site: str
    lora_us: float
    base_us: float


def make_pool(
    shape: ModelShape,
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scaled: bool = False,
) -> tuple[LoraPool, dict[str, list[LoraSite]]]:
    """One adapter per rank on every site, and the sites by name, one per layer. `scaled`: in 8 bits."""
    sites: dict[str, list[LoraSite]] = {name: [] for name in shape.sites()}
    entry = 0
    entries: list[tuple[int, int, int]] = []
    for _ in range(shape.layers):
        for name, (in_features, widths) in shape.sites().items():
            slices = tuple((sum(widths[:index]), width) for index, width in enumerate(widths))
            sites[name].append(LoraSite(entry, in_features, slices))
            entries += [(entry + index, in_features, width) for index, width in enumerate(widths)]
            entry += len(widths)
    multiple = extent_alignment({length for _, *lengths in entries for length in lengths})
    if scaled:
        multiple = ALIGNMENT
    layouts = [
        adapter_layout(
            [EntryShape(*shape_of_entry, rank) for shape_of_entry in entries], multiple, scaled=scaled
        )
        for rank in ranks
    ]
    starts, end = [], 0
    for layout in layouts:
        starts.append(end)
        end = -(-(end + layout.num_elements) // multiple) * multiple
    pool = LoraPool.allocate(
        num_elements=end,
        num_slots=len(ranks),
        num_entries=entry,
        dtype=dtype,
        device=device,
        max_rank=max(ranks),
        scaled=scaled,
    )
    if scaled:
        pool.arena.random_(-127, 128)
    else:
        pool.arena.normal_(std=0.02)
    for slot, (start, layout) in enumerate(zip(starts, layouts, strict=True)):
        pool.bind(slot, start, layout)
        for adapted, offset in zip(layout.entries, layout.scale_offset, strict=False):
            scales = pool.arena[start + offset : start + offset + 4 * adapted.rank_padded]
            scales.view(torch.float32).fill_(1e-6)
    return pool, sites


def best_us(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Best time of one call of `run`, after two to warm up."""
    run()
    run()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: str, tokens: int, adapters: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[Timing]:
    """Time one batch: `tokens` tokens spread evenly over `adapters` adapters of ranks 4 to 32."""
    shape = MODELS[model]
    ranks = [RANKS[index % len(RANKS)] for index in range(adapters)]
    pool, sites = make_pool(shape, ranks, dtype, device)
    bounds = [tokens * index // adapters for index in range(adapters + 1)]
    runs: list[Run] = [(start, end, ((slot, 1.0),)) for slot, (start, end) in enumerate(pairwise(bounds))]
    buffers = LoraBatchBuffers(
        max_tokens=tokens, max_pairs=tokens, max_segments=adapters, device=device, fixed_grid=True
    )
    batch = buffers.fill(runs)
    rows = []
    for name, (in_features, widths) in shape.sites().items():
        x = torch.randn(tokens, in_features, device=device).to(dtype)
        y = torch.zeros(tokens, sum(widths), device=device, dtype=dtype)
        weights = [
            torch.randn(sum(widths), in_features, device=device, dtype=dtype) for _ in range(shape.layers)
        ]

        def run_lora(x: Tensor = x, y: Tensor = y, name: str = name) -> None:
            for site in sites[name]:
                lora.apply(x, y, pool, site, batch)

        def run_base(x: Tensor = x, weights: list[Tensor] = weights) -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        lora_us = best_us(run_lora, device, repeats) / shape.layers
        base_us = best_us(run_base, device, repeats) / shape.layers
        rows.append(Timing(model, tokens, adapters, name, lora_us, base_us))
    total_lora = sum(row.lora_us for row in rows) * shape.layers
    total_base = sum(row.base_us for row in rows) * shape.layers
    return [*rows, Timing(model, tokens, adapters, "all", total_lora, total_base)]


def main() -> None:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(description="time the LoRA op against the base matmul of each site")
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="default: the small two")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1, help="torch threads on CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    mixes = [(8, 8), (32, 1), (32, 16), (32, 32), (256, 1), (256, 4)]
    if not arguments.json:
        print("model        tokens adapters site        lora us    base us lora/base")
    with torch.inference_mode():
        for model in arguments.model or ["demo", "llama-100m"]:
            for tokens, adapters in mixes:
                for row in measure(model, tokens, adapters, dtype, device, arguments.repeats):
                    if arguments.json:
                        print(json.dumps(asdict(row)))
                        continue
                    ratio = row.lora_us / row.base_us
                    print(
                        f"{row.model:12} {row.tokens:6} {row.adapters:8} {row.site:8} "
                        f"{row.lora_us:10.1f} {row.base_us:10.1f} {ratio:9.1%}"
                    )


if __name__ == "__main__":
    main()
