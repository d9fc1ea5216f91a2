"""Time paged ragged attention.

    python -m loraplex_bench.ops.ops_attention [--threads N]                on this CPU
    python -m loraplex_bench.ops.ops_attention --device cuda                on a GPU, in bfloat16

On CPU, one row per workload: the host's share once per step, then microseconds per layer (best of several
runs) for writing the keys and values, for the op, and for the plain way to do the same: one gather and one
SDPA call per sequence. Layers take turns, as in a model, so that the cache of the next one is not in the
processor's.

On CUDA passes over the layers are replayed as graphs, and the floor of a workload stands beside its time:
the fewest bytes it must move, or the operations it must do, at the rates that a large copy and a large matrix
product reach on the same card. The peers are SDPA once per sequence, and once for all padded to the longest;
their keys and values lie dense already, so what gathering pages would cost them is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from loraplex_kernels.attention import AttentionBatch, LayerShape, kv_cache_shape, paged_attention, write_kv

BLOCK_SIZE = 16
MAX_CACHE_BYTES = 1 << 30
COLD_BYTES = 256 << 20
"""Caches that take turns hold this much together at least: several times a GPU's second level cache."""


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

    def least_bytes(self, element: int, cache_element: int) -> int:
        """What must move: each visible key and value once, queries in, results out."""
        window = self.sliding_window or 1 << 62
        keys = sum(min(context, query + window - 1) for query, context in self.sequences)
        queries = sum(query for query, _ in self.sequences)
        cached = 2 * keys * self.num_kv_heads * self.head_dim * cache_element
        return cached + 2 * queries * self.num_heads * self.head_dim * element

    def flops(self) -> int:
        """Operations of the two products, for visible pairs of query and key only."""
        window = self.sliding_window or 1 << 62
        pairs = 0
        for query, context in self.sequences:
            first = context - query
            # Queries that stand before the window's end see all keys up to themselves; the others, a window.
            early = min(max(window - 1 - first, 0), query)
            pairs += early * first + early * (early + 1) // 2 + (query - early) * min(window, context)
        return 4 * pairs * self.num_heads * self.head_dim


@dataclass(frozen=True)
class Timing:
    """Best microseconds: `build` per step, the others per layer."""

    build: float
    write: float
    attend: float
    loop: float


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes per second in a large copy (read and written), operations per second
    in a large matrix product.
    """

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, workload: Workload, element: int, cache_element: int) -> float:
        """No kernel can be faster."""
        bytes_s = workload.least_bytes(element, cache_element) / self.bytes_per_s
        return max(bytes_s, workload.flops() / self.flops_per_s) * 1e6


@dataclass(frozen=True)
class GpuTiming:
    """Median microseconds per layer; NaN for a peer that cannot do the workload."""

    workload: str
    write: float
    attend: float
    floor: float
    per_sequence: float
    padded: float


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


@dataclass(frozen=True)
class Inputs:
    """A workload's tensors, and its caches, whose blocks lie in random order."""

    workload: Workload
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    caches: list[torch.Tensor]
    query_start: np.ndarray
    context_len: np.ndarray
    block_start: np.ndarray
    blocks: np.ndarray
    slots: np.ndarray

    def build(self) -> AttentionBatch:
        """The step's metadata, with all that the layers will ask for."""
        load = self.workload
        return AttentionBatch.build(
            self.query_start,
            self.context_len,
            self.block_start,
            self.blocks,
            self.slots,
            block_size=BLOCK_SIZE,
            device=self.q.device,
            layers=[
                LayerShape(
                    load.num_heads, load.num_kv_heads, load.head_dim, self.q.dtype, load.sliding_window
                )
            ],
        )

    def attend(self, batch: AttentionBatch, cache: torch.Tensor) -> torch.Tensor:
        """The op."""
        return paged_attention(
            self.q,
            cache,
            batch,
            scale=self.workload.head_dim**-0.5,
            sliding_window=self.workload.sliding_window,
            softcap=self.workload.softcap,
            k=self.k,
            v=self.v,
        )

    def keys_values(self, sequence: int, cache: torch.Tensor) -> torch.Tensor:
        """One sequence's keys and values, gathered: [2, Hkv, context_len, D]."""
        table = self.blocks[self.block_start[sequence] : self.block_start[sequence + 1]]
        blocks = cache.index_select(0, torch.from_numpy(table).to(cache.device))
        return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : int(self.context_len[sequence])]


def make_inputs(
    workload: Workload, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device, layers: int
) -> Inputs:
    """Random inputs with `layers` caches, or as many as `MAX_CACHE_BYTES` allow."""
    queries, contexts = (np.array(column) for column in zip(*workload.sequences, strict=True))
    query_start = np.concatenate(([0], np.cumsum(queries)))
    block_start = np.concatenate(([0], np.cumsum(-(-contexts // BLOCK_SIZE))))
    total = int(block_start[-1])
    blocks = np.random.default_rng(1).permutation(2 * total)[:total]
    owner = np.repeat(np.arange(len(queries)), queries)
    position = (contexts - query_start[1:])[owner] + np.arange(len(owner))
    slots = blocks[block_start[owner] + position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
    tokens = len(owner)
    shape = (tokens, workload.num_kv_heads, workload.head_dim)
    q = torch.randn(tokens, workload.num_heads, workload.head_dim, dtype=dtype, device=device)
    k, v = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)
    cache_shape = kv_cache_shape(2 * total, BLOCK_SIZE, *shape[1:])
    layers = max(1, min(layers, MAX_CACHE_BYTES // (math.prod(cache_shape) * cache_dtype.itemsize)))
    caches = [torch.randn(cache_shape, dtype=dtype, device=device).to(cache_dtype) for _ in range(layers)]
    return Inputs(workload, q, k, v, caches, query_start, contexts, block_start, blocks, slots)


def measure(workload: Workload, dtype: torch.dtype, device: torch.device, layers: int, runs: int) -> Timing:
    """Time one workload on a CPU."""
    inputs = make_inputs(workload, dtype, dtype, device, layers)
    q, k, v, caches = inputs.q, inputs.k, inputs.v, inputs.caches
    turn = itertools.cycle(caches)
    window, softcap = workload.sliding_window, workload.softcap
    batch = inputs.build()
    for cache in caches:
        write_kv(k, v, cache, batch)
    per_sequence = [
        (int(row), query, context, mask(query, context, window, q))
        for row, (query, context) in zip(inputs.query_start, workload.sequences, strict=False)
    ]

    def loop(cache: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        for index, (row, query, _, bias) in enumerate(per_sequence):
            heads = inputs.keys_values(index, cache)
            rows = q[row : row + query].transpose(0, 1)
            result = F.scaled_dot_product_attention(
                rows[None], heads[:1], heads[1:], attn_mask=bias, enable_gqa=True
            )
            out[row : row + query] = result[0].transpose(0, 1)
        return out

    if softcap is None:
        torch.testing.assert_close(inputs.attend(batch, caches[0]), loop(caches[0]), atol=2e-2, rtol=2e-2)
    first = best(lambda: inputs.attend(inputs.build(), caches[0]), device, runs)
    again = best(lambda: inputs.attend(batch, caches[0]), device, runs)
    return Timing(
        build=max(first - again, 0.0),
        write=best(lambda: write_kv(k, v, next(turn), batch), device, runs),
        attend=best(lambda: inputs.attend(batch, next(turn)), device, runs),
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


def gpu_workloads() -> list[Workload]:
    """Steps of an 8B Llama (32 query heads, 8 key heads of 128), and layers of other models."""
    llama = (32, 8, 128)
    found = [
        Workload(f"{batch} decodes, context {context}", [(1, context)] * batch, *llama)
        for batch, contexts in (
            (1, (128, 1024, 8192)),
            (16, (1024, 8192)),
            (64, (128, 512, 1024, 2048, 4096, 8192)),
            (256, (128, 1024)),
        )
        for context in contexts
    ]
    ragged = [(1, int(context)) for context in np.geomspace(128, 8192, 64)]
    thousand = [(1, 1024)] * 64
    return [
        *found,
        Workload("64 decodes, context 128-8192", ragged, *llama),
        Workload("64 decodes, context 128-8192, window 1024", ragged, *llama, sliding_window=1024),
        Workload("1 decode, context 131072", [(1, 131072)], *llama),
        Workload("64 decodes, context 1024, 32/8 x 64", thousand, 32, 8, 64),
        Workload("64 decodes, context 1024, 32/32 x 96", thousand, 32, 32, 96),
        Workload("64 decodes, context 1024, 16/8 x 256", thousand, 16, 8, 256),
        Workload("64 decodes, context 1024, 16/8 x 256, softcap", thousand, 16, 8, 256, softcap=50.0),
        Workload("1 prompt of 512", [(512, 512)], *llama),
        Workload("1 prompt of 2048", [(2048, 2048)], *llama),
        Workload("1 prompt of 8192", [(8192, 8192)], *llama),
        Workload("8 prompts of 1024", [(1024, 1024)] * 8, *llama),
        Workload("1 prompt of 4096, window 1024", [(4096, 4096)], *llama, sliding_window=1024),
        Workload("1 prompt of 2048, 16/8 x 256, softcap", [(2048, 2048)], 16, 8, 256, softcap=50.0),
        Workload("512 more of 4096", [(512, 4096)], *llama),
        Workload("63 decodes, context 1024 + 512 more of 1024", [*thousand[:63], (512, 1024)], *llama),
    ]


def measure_ceilings(device: torch.device) -> Ceilings:
    """Time a copy of 1 GiB, and a product of 8192 x 8192 bfloat16 matrices."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_us = pass_us([lambda: target.copy_(source)], device)
    left, right = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product_us = pass_us([lambda: left @ right], device)
    return Ceilings(2 * source.numel() / copy_us * 1e6, 2 * 8192**3 / product_us * 1e6)


def measure_on_gpu(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    cache_dtype: torch.dtype | None = None,
) -> GpuTiming:
    """Time one workload, after checking it against the peers; they are given keys and values of `dtype`."""
    cache_dtype = cache_dtype or dtype
    least = workload.least_bytes(dtype.itemsize, cache_dtype.itemsize)
    inputs = make_inputs(workload, dtype, cache_dtype, device, layers=-(-COLD_BYTES // least))
    batch = inputs.build()
    for cache in inputs.caches:
        write_kv(inputs.k, inputs.v, cache, batch)
    result = inputs.attend(batch, inputs.caches[0])
    peers = []
    for make in (per_sequence_peer, padded_peer):
        calls = [make(inputs, cache) for cache in inputs.caches]
        found = math.nan
        if calls[0] is not None:
            torch.testing.assert_close(calls[0](), result, atol=2e-2, rtol=2e-2)
            found = pass_us([call for call in calls if call is not None], device)
        peers.append(found)
        del calls
    return GpuTiming(
        workload.name,
        write=pass_us(
            [partial(write_kv, inputs.k, inputs.v, cache, batch) for cache in inputs.caches], device
        ),
        attend=pass_us([partial(inputs.attend, batch, cache) for cache in inputs.caches], device),
        floor=ceilings.floor_us(workload, dtype.itemsize, cache_dtype.itemsize),
        per_sequence=peers[0],
        padded=peers[1],
    )


def per_sequence_peer(inputs: Inputs, cache: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """SDPA once per sequence over dense keys and values; None where logits are capped, which it cannot do."""
    load, q = inputs.workload, inputs.q
    if load.softcap is not None:
        return None
    group = load.num_heads // load.num_kv_heads
    prepared = []
    for index, (query, context) in enumerate(load.sequences):
        seen = min(context, query + load.sliding_window - 1) if load.sliding_window else context
        dense = inputs.keys_values(index, cache)[:, None, :, context - seen :].to(q.dtype).contiguous()
        row = int(inputs.query_start[index])
        bias: torch.Tensor | None = None
        if load.sliding_window is not None and query > 1:
            # No fused kernel takes a mask and shared key heads.
            bias = mask(query, seen, load.sliding_window, q)
            dense = dense.repeat_interleave(group, dim=2)
        elif query > 1:
            bias = causal_lower_right(query, seen)
        prepared.append((row, query, dense, bias))

    def call() -> torch.Tensor:
        out = torch.empty_like(q)
        for row, query, dense, bias in prepared:
            keys, values = dense
            if query == 1:
                # The query heads of a key head stand in for queries, so that nothing is masked or repeated.
                rows = q[row].view(1, load.num_kv_heads, group, load.head_dim)
                out[row] = F.scaled_dot_product_attention(rows, keys, values).view(q.shape[1:])
            else:
                rows = q[row : row + query].transpose(0, 1)[None]
                shared = keys.shape[1] != load.num_heads
                result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, enable_gqa=shared)
                out[row : row + query] = result[0].transpose(0, 1)
        return out

    return call


def padded_peer(inputs: Inputs, cache: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """One SDPA call for all sequences, padded to the longest: decodes, or whole prompts of one length."""
    load, q = inputs.workload, inputs.q
    queries, contexts = (set(column) for column in zip(*load.sequences, strict=True))
    decodes = queries == {1}
    if load.softcap is not None or not (decodes or (queries == contexts and load.sliding_window is None)):
        return None
    if len(queries) > 1:
        return None
    window = load.sliding_window or max(contexts)
    lengths = [min(context, window) if decodes else context for _, context in load.sequences]
    shape = (2, len(lengths), load.num_kv_heads, max(lengths), load.head_dim)
    dense = torch.zeros(shape, dtype=q.dtype, device=q.device)
    for index, length in enumerate(lengths):
        dense[:, index, :, :length] = inputs.keys_values(index, cache)[:, :, -length:].to(q.dtype)
    bias: torch.Tensor | None = None
    if len(set(lengths)) > 1:
        hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        zeros = torch.zeros(hidden.shape, dtype=q.dtype)
        bias = zeros.masked_fill_(hidden, -torch.inf)[:, None, None].to(q.device)
    keys, values = dense

    def call() -> torch.Tensor:
        if decodes:
            rows = q.view(len(lengths), load.num_kv_heads, -1, load.head_dim)
            return F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias).view(q.shape)
        rows = q.view(len(lengths), -1, load.num_heads, load.head_dim).transpose(1, 2)
        result = F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2).reshape(q.shape)

    return call


def pass_us(calls: list[Callable[[], object]], device: torch.device, repeats: int = 20) -> float:
    """Median microseconds of one of `calls`, run one after the other; on CUDA, as a replayed graph."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e6)
        return float(np.median(times)) / len(calls)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    event = partial(torch.cuda.Event, enable_timing=True)
    events = [(event(), event()) for _ in range(repeats)]
    for begin_event, end_event in events:
        begin_event.record()
        graph.replay()
        end_event.record()
    torch.cuda.synchronize(device)
    times = [begin_event.elapsed_time(end_event) * 1e3 for begin_event, end_event in events]
    return float(np.median(times)) / len(calls)


def print_gpu_table(
    dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device, only: str, *, as_json: bool
) -> None:
    """Measure and print row by row."""
    ceilings = measure_ceilings(device)
    if as_json:
        print(json.dumps({"device": torch.cuda.get_device_name(device), **asdict(ceilings)}))
    else:
        print(
            f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {dtype}, cache {cache_dtype}: "
            f"{ceilings.bytes_per_s / 1e12:.2f} TB/s, {ceilings.flops_per_s / 1e12:.0f} TFLOP/s; "
            "microseconds per layer"
        )
        print(
            f"{'workload':46} {'write':>7} {'attention':>9} {'floor':>8} {'share':>6} "
            f"{'per sequence':>13} {'ratio':>6} {'padded':>9} {'ratio':>6}"
        )
    for workload in gpu_workloads():
        if only not in workload.name:
            continue
        t = measure_on_gpu(workload, dtype, device, ceilings, cache_dtype)
        torch.cuda.empty_cache()
        if as_json:
            print(json.dumps(asdict(t)))
        else:
            print(
                f"{t.workload:46} {t.write:7.1f} {t.attend:9.1f} {t.floor:8.1f} {t.floor / t.attend:6.0%} "
                f"{t.per_sequence:13.1f} {t.per_sequence / t.attend:6.2f} "
                f"{t.padded:9.1f} {t.padded / t.attend:6.2f}"
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time paged ragged attention.")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument(
        "--cache-dtype", choices=(*dtypes, "float8_e4m3fn"), help="CUDA only; default: that of --dtype"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="CPU: caches that take turns (default 12)")
    parser.add_argument(
        "--runs", type=int, default=30, help="CPU: bursts per figure, of which the best counts"
    )
    parser.add_argument("--only", default="", help="run the workloads whose name contains this")
    parser.add_argument("--json", action="store_true", help="CUDA: print JSON lines instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if device.type == "cuda":
        cache_dtype = getattr(torch, args.cache_dtype) if args.cache_dtype else dtype
        with torch.inference_mode():
            print_gpu_table(dtype, cache_dtype, device, args.only, as_json=args.json)
        return
    print(f"torch {torch.__version__}, {args.device}, {dtype}, {args.threads} threads; microseconds")
    print(f"{'workload':42} {'build/step':>10} {'write':>8} {'attention':>10} {'per sequence':>13}")
    with torch.inference_mode():
        for workload in workloads():
            if args.only in workload.name:
                t = measure(workload, dtype, device, args.layers, args.runs)
                print(f"{workload.name:42} {t.build:10.0f} {t.write:8.1f} {t.attend:10.1f} {t.loop:13.1f}")


if __name__ == "__main__":
    main()
