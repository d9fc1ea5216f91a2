"""Paged ragged attention beside torch's: once per sequence, and once for all padded to the longest.

On a GPU the peers' keys and values lie dense already, so what gathering blocks would cost them is not
counted; on a CPU one peer gathers them, as it would have to. A layer's cache is cold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from loraplex_bench.ops.registry import Contender, Op, Setting, UnavailableError, unavailable
from loraplex_kernels import dispatch
from loraplex_kernels.attention import AttentionBatch, LayerShape, kv_cache_shape, paged_attention, write_kv

BLOCK_SIZE = 16
MAX_CACHE_BYTES = 1 << 30
"""All copies of a layer's cache together."""


class Heads(NamedTuple):
    """A layer's query heads, key heads, and their width."""

    queries: int
    keys: int
    dim: int


LLAMA = Heads(32, 8, 128)
"""Of an 8B Llama."""

LLAMA_100M = Heads(12, 4, 64)
GEMMA = Heads(16, 8, 256)
SMALL = Heads(6, 2, 32)


@dataclass(frozen=True)
class Workload:
    """A step's sequences as (query_len, context_len), and the shape of one layer."""

    name: str
    sequences: list[tuple[int, int]]
    heads: Heads = LLAMA_100M
    sliding_window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        return self.name

    def least_bytes(self, element: int, cache_element: int) -> int:
        """The fewest bytes to move: each visible key and value once, queries in, results out."""
        window = self.sliding_window or 1 << 62
        keys = sum(min(context, query + window - 1) for query, context in self.sequences)
        queries = sum(query for query, _ in self.sequences)
        cached = 2 * keys * self.heads.keys * self.heads.dim * cache_element
        return cached + 2 * queries * self.heads.queries * self.heads.dim * element

    def flops(self) -> int:
        """Operations of the two products, for visible pairs of query and key only."""
        window = self.sliding_window or 1 << 62
        pairs = 0
        for query, context in self.sequences:
            first = context - query
            # Queries that stand before the window's end see all keys up to themselves; the others, a window.
            early = min(max(window - 1 - first, 0), query)
            pairs += early * first + early * (early + 1) // 2 + (query - early) * min(window, context)
        return 4 * pairs * self.heads.queries * self.heads.dim


def cpu_workloads() -> list[Workload]:
    """The batches a CPU server sees most, and a few that are hard."""
    rng = np.random.default_rng(0)
    near_96 = [(1, int(context)) for context in rng.integers(80, 113, 32)]
    short = [(1, int(context)) for context in rng.integers(20, 61, 32)]
    uneven = [(1, int(context)) for context in np.geomspace(16, 2048, 32)]
    return [
        Workload("32 decodes, context ~96", near_96),
        Workload("32 decodes, context 20-60, small", short, SMALL),
        Workload("1 decode, context 96", [(1, 96)]),
        Workload("32 decodes, context 16-2048", uneven),
        Workload("32 decodes, context 16-2048, window 128", uneven, sliding_window=128),
        Workload("8 decodes, context 4096, 32/8 x 128", [(1, 4096)] * 8, LLAMA),
        Workload("30 decodes + a prompt of 256", [*near_96[:30], (256, 256)]),
        Workload("30 decodes + 256 more of 512", [*near_96[:30], (256, 512)]),
        Workload("32 prompts of 64", [(64, 64)] * 32),
        Workload("32 prompts of 20-40, small", [(c, c) for _, c in short], SMALL),
        Workload("24 prompts of 16-160", [(int(c), int(c)) for c in rng.integers(16, 161, 24)]),
        Workload("1 prompt of 2048", [(2048, 2048)]),
        Workload("32 decodes, context ~96, softcap", near_96, softcap=50.0),
        Workload("32 prompts of 64, softcap", [(64, 64)] * 32, softcap=50.0),
    ]


def gpu_workloads() -> list[Workload]:
    """Steps of an 8B Llama and layers of other models."""
    found = [
        Workload(f"{batch} decodes, context {context}", [(1, context)] * batch, LLAMA)
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
        Workload("64 decodes, context 128-8192", ragged, LLAMA),
        Workload("64 decodes, context 128-8192, window 1024", ragged, LLAMA, sliding_window=1024),
        Workload("1 decode, context 131072", [(1, 131072)], LLAMA),
        Workload("64 decodes, context 1024, 32/8 x 64", thousand, Heads(32, 8, 64)),
        Workload("64 decodes, context 1024, 32/32 x 96", thousand, Heads(32, 32, 96)),
        Workload("64 decodes, context 1024, 16/8 x 256", thousand, GEMMA),
        Workload("64 decodes, context 1024, 16/8 x 256, softcap", thousand, GEMMA, softcap=50.0),
        Workload("1 prompt of 512", [(512, 512)], LLAMA),
        Workload("1 prompt of 2048", [(2048, 2048)], LLAMA),
        Workload("1 prompt of 8192", [(8192, 8192)], LLAMA),
        Workload("8 prompts of 1024", [(1024, 1024)] * 8, LLAMA),
        Workload("1 prompt of 4096, window 1024", [(4096, 4096)], LLAMA, sliding_window=1024),
        Workload("1 prompt of 2048, 16/8 x 256, softcap", [(2048, 2048)], GEMMA, softcap=50.0),
        Workload("512 more of 4096", [(512, 4096)], LLAMA),
        Workload("63 decodes, context 1024 + 512 more of 1024", [*thousand[:63], (512, 1024)], LLAMA),
    ]


TINY = [
    Workload("decodes", [(1, 30), (1, 5), (1, 33)], SMALL),
    Workload("decodes, window", [(1, 30), (1, 5)], SMALL, sliding_window=12),
    Workload("prompts", [(20, 20)] * 2, SMALL),
    Workload("mixed, softcap", [(1, 30), (9, 20)], SMALL, softcap=50.0),
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
        layer = LayerShape(*load.heads, self.q.dtype, load.sliding_window)
        return AttentionBatch.build(
            self.query_start,
            self.context_len,
            self.block_start,
            self.blocks,
            self.slots,
            block_size=BLOCK_SIZE,
            device=self.q.device,
            layers=[layer],
        )

    def attend(self, batch: AttentionBatch, cache: torch.Tensor) -> torch.Tensor:
        """The op."""
        return paged_attention(
            self.q,
            cache,
            batch,
            scale=self.workload.heads.dim**-0.5,
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
    shape = (tokens, workload.heads.keys, workload.heads.dim)
    q = torch.randn(tokens, workload.heads.queries, workload.heads.dim, dtype=dtype, device=device)
    k, v = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)
    cache_shape = kv_cache_shape(2 * total, BLOCK_SIZE, *shape[1:])
    layers = max(1, min(layers, MAX_CACHE_BYTES // (math.prod(cache_shape) * cache_dtype.itemsize)))
    caches = [torch.randn(cache_shape, dtype=dtype, device=device).to(cache_dtype) for _ in range(layers)]
    return Inputs(workload, q, k, v, caches, query_start, contexts, block_start, blocks, slots)


Peer = Callable[[Inputs, torch.Tensor], Callable[[], torch.Tensor] | None]
"""Makes the call on one cache; None for a workload that it cannot do."""


def per_sequence_peer(inputs: Inputs, cache: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """SDPA once per sequence over dense keys and values; None where logits are capped, which it cannot do."""
    load, q = inputs.workload, inputs.q
    if load.softcap is not None:
        return None
    group = load.heads.queries // load.heads.keys
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
                rows = q[row].view(1, load.heads.keys, group, load.heads.dim)
                out[row] = F.scaled_dot_product_attention(rows, keys, values).view(q.shape[1:])
            else:
                rows = q[row : row + query].transpose(0, 1)[None]
                shared = keys.shape[1] != load.heads.queries
                result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, enable_gqa=shared)
                out[row : row + query] = result[0].transpose(0, 1)
        return out

    return call


def gathering_peer(inputs: Inputs, cache: torch.Tensor) -> Callable[[], torch.Tensor] | None:
    """As `per_sequence_peer`, with what it takes to gather each sequence's blocks in every call."""
    if inputs.workload.softcap is not None:
        return None

    def call() -> torch.Tensor:
        attend = per_sequence_peer(inputs, cache)
        assert attend is not None
        return attend()

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
    shape = (2, len(lengths), load.heads.keys, max(lengths), load.heads.dim)
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
            rows = q.view(len(lengths), load.heads.keys, -1, load.heads.dim)
            return F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias).view(q.shape)
        rows = q.view(len(lengths), -1, load.heads.queries, load.heads.dim).transpose(1, 2)
        result = F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=True)
        return result.transpose(1, 2).reshape(q.shape)

    return call


def mask(query: int, context: int, window: int | None, q: torch.Tensor) -> torch.Tensor | None:
    """Additive causal mask [query, context] of one sequence; None for a lone query without a window."""
    if query == 1 and window is None:
        return None
    position = torch.arange(context - query, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)
    hidden = (key > position) | (key <= position - (window or context))
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)


def prepare(workload: Workload, setting: Setting) -> Iterator[Contender]:
    """The op, what the step needs besides, and the peers; keys and values of the peers are of q's dtype."""
    cache_dtype = setting.cache_dtype or setting.dtype
    least = workload.least_bytes(setting.dtype.itemsize, cache_dtype.itemsize)
    inputs = make_inputs(workload, setting.dtype, cache_dtype, setting.device, setting.copies(least))
    batch, caches = inputs.build(), inputs.caches
    for cache in caches:
        write_kv(inputs.k, inputs.v, cache, batch)

    def truth() -> list[torch.Tensor]:
        """SDPA's; where that cannot do the workload, the kernels' reference."""
        if (call := per_sequence_peer(inputs, caches[0])) is not None:
            return [call()]
        with dispatch.using("torch"):
            return [inputs.attend(inputs.build(), caches[0])]

    def contender(name: str, make: Peer) -> Contender:
        first = make(inputs, caches[0])
        if first is None:
            return unavailable(name, UnavailableError("it cannot do this workload"))
        return Contender(
            name,
            lambda: [call for cache in caches if (call := make(inputs, cache)) is not None],
            lambda: [first()],
            truth,
        )

    yield Contender(
        "loraplex",
        lambda: [partial(inputs.attend, batch, cache) for cache in caches],
        lambda: [inputs.attend(batch, caches[0])],
        truth,
        least_bytes=least,
        flops=workload.flops(),
        role="own",
    )
    yield Contender(
        "write",
        lambda: [partial(write_kv, inputs.k, inputs.v, cache, batch) for cache in caches],
        role="part",
    )
    if setting.device.type == "cpu":
        yield Contender("build a step", lambda: [inputs.build], role="part")
        yield contender("SDPA, gathering", gathering_peer)
    yield contender("SDPA one by one", per_sequence_peer)
    yield contender("SDPA padded", padded_peer)


OP = Op("attention", {"cuda": gpu_workloads, "cpu": cpu_workloads}, TINY, prepare)
