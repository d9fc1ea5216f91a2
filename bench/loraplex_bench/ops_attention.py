"""Time paged ragged attention on this machine: ``python -m loraplex_bench.ops_attention [--threads N]``.

One row per workload: the host's share once per step, then microseconds per layer (best of several runs) for
writing the keys and values, for the op, and for the plain way to do the same: one gather and one SDPA call
per sequence. Layers take turns, as in a model, so that the cache of the next one is not in the processor's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from loraplex_kernels.attention import AttentionBatch, kv_cache_shape, paged_attention, write_kv

BLOCK_SIZE = 16
MAX_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Workload:
    """A step's sequences as (query_len, context_len), and the shape of one layer."""

    name: str
    sequences: list[tuple[int, int]]
    num_heads: int = 12
    num_kv_heads: int = 4
    head_dim: int = 64
    sliding_window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Timing:
    """Best microseconds: `build` per step, the others per layer."""

    build: float
    write: float
    attend: float
    loop: float


def workloads() -> list[Workload]:
    """The batches a CPU server sees most, and a few that are hard."""
    rng = np.random.default_rng(0)
    near_96 = [(1, int(context)) for context in rng.integers(80, 113, 32)]
    short = [(1, int(context)) for context in rng.integers(20, 61, 32)]
    uneven = [(1, int(context)) for context in np.geomspace(16, 2048, 32)]
    return [
        Workload("32 decodes, context ~96", near_96),
        Workload("32 decodes, context 20-60, small", short, num_heads=6, num_kv_heads=2, head_dim=32),
        Workload("1 decode, context 96", [(1, 96)]),
        Workload("32 decodes, context 16-2048", uneven),
        Workload("32 decodes, context 16-2048, window 128", uneven, sliding_window=128),
        Workload("8 decodes, context 4096, 32/8 x 128", [(1, 4096)] * 8, 32, 8, 128),
        Workload("30 decodes + a prompt of 256", [*near_96[:30], (256, 256)]),
        Workload("30 decodes + 256 more of 512", [*near_96[:30], (256, 512)]),
        Workload("32 prompts of 64", [(64, 64)] * 32),
        Workload("32 prompts of 20-40, small", [(c, c) for _, c in short], 6, 2, 32),
        Workload("24 prompts of 16-160", [(int(c), int(c)) for c in rng.integers(16, 161, 24)]),
        Workload("1 prompt of 2048", [(2048, 2048)]),
        Workload("32 decodes, context ~96, softcap", near_96, softcap=50.0),
        Workload("32 prompts of 64, softcap", [(64, 64)] * 32, softcap=50.0),
    ]


def measure(workload: Workload, dtype: torch.dtype, device: torch.device, layers: int, runs: int) -> Timing:
    """Time one workload over a cache whose blocks lie in random order."""
    queries, contexts = (np.array(column) for column in zip(*workload.sequences, strict=True))
    num_blocks = -(-contexts // BLOCK_SIZE)
    starts = np.concatenate(([0], np.cumsum(num_blocks)))
    blocks = np.random.default_rng(1).permutation(2 * int(starts[-1]))[: starts[-1]]
    slots = np.concatenate(
        [
            blocks[start + positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            for start, query, context in zip(starts, queries, contexts, strict=False)
            for positions in [np.arange(context - query, context)]
        ]
    )
    query_start = np.concatenate(([0], np.cumsum(queries)))
    tokens = int(query_start[-1])
    shape = (tokens, workload.num_kv_heads, workload.head_dim)
    q = torch.randn(tokens, workload.num_heads, workload.head_dim, dtype=dtype, device=device)
    k, v = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)
    cache_shape = kv_cache_shape(2 * int(starts[-1]), BLOCK_SIZE, *shape[1:])
    layers = max(1, min(layers, MAX_CACHE_BYTES // (math.prod(cache_shape) * dtype.itemsize)))
    caches = [torch.randn(cache_shape, dtype=dtype, device=device) for _ in range(layers)]
    turn = itertools.cycle(caches)
    scale, window, softcap = workload.head_dim**-0.5, workload.sliding_window, workload.softcap

    def build() -> AttentionBatch:
        return AttentionBatch.build(
            query_start, contexts, starts, blocks, slots, block_size=BLOCK_SIZE, device=device
        )

    def attend(batch: AttentionBatch, cache: torch.Tensor) -> torch.Tensor:
        return paged_attention(q, cache, batch, scale=scale, sliding_window=window, softcap=softcap, k=k, v=v)

    batch = build()
    for cache in caches:
        write_kv(k, v, cache, batch)
    per_sequence = [
        (
            int(row),
            int(query),
            torch.from_numpy(table).to(device),
            int(context),
            mask(int(query), int(context), window, q),
        )
        for row, query, context, table in zip(
            query_start, queries, contexts, np.split(blocks, starts[1:-1]), strict=False
        )
    ]

    def loop(cache: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        for row, query, table, context, bias in per_sequence:
            heads = cache.index_select(0, table).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
            rows = q[row : row + query].transpose(0, 1)
            result = F.scaled_dot_product_attention(
                rows[None], heads[:1], heads[1:], attn_mask=bias, scale=scale, enable_gqa=True
            )
            out[row : row + query] = result[0].transpose(0, 1)
        return out

    if softcap is None:
        torch.testing.assert_close(attend(batch, caches[0]), loop(caches[0]), atol=2e-2, rtol=2e-2)
    first = best(lambda: attend(build(), caches[0]), device, runs)
    again = best(lambda: attend(batch, caches[0]), device, runs)
    return Timing(
        build=max(first - again, 0.0),
        write=best(lambda: write_kv(k, v, next(turn), batch), device, runs),
        attend=best(lambda: attend(batch, next(turn)), device, runs),
        loop=best(lambda: loop(next(turn)), device, runs) if softcap is None else float("nan"),
    )


def mask(query: int, context: int, window: int | None, q: torch.Tensor) -> torch.Tensor | None:
    """Additive causal mask [query, context] of one sequence; None for a lone query without a window."""
    if query == 1 and window is None:
        return None
    position = torch.arange(context - query, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)
    hidden = (key > position) | (key <= position - (window or context))
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)


def best(function: Callable[[], object], device: torch.device, runs: int) -> float:
    """Best mean microseconds of `runs` bursts of calls, each burst about 3 ms."""

    def burst(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls * 1e6

    burst(2)
    calls = max(1, int(3_000 / burst(2)))
    return min(burst(calls) for _ in range(runs))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time paged ragged attention.")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="caches that take turns (default 12)")
    parser.add_argument("--runs", type=int, default=30, help="bursts per figure, of which the best counts")
    parser.add_argument("--only", default="", help="run the workloads whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.threads} threads; microseconds")
    print(f"{'workload':42} {'build/step':>10} {'write':>8} {'attention':>10} {'per sequence':>13}")
    with torch.inference_mode():
        for workload in workloads():
            if args.only in workload.name:
                dtype, device = getattr(torch, args.dtype), torch.device(args.device)
                t = measure(workload, dtype, device, args.layers, args.runs)
                print(f"{workload.name:42} {t.build:10.0f} {t.write:8.1f} {t.attend:10.1f} {t.loop:13.1f}")


if __name__ == "__main__":
    main()
