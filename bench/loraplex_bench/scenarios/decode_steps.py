"""Whole decode steps of a Llama-3-8B with random weights, through the server's own runner.

    python -m loraplex_bench.gpu --only step

Each row is a batch of sequences of one context length, decoding one token each, with some number of distinct
rank-16 adapters in turn. A step is what the engine runs: the plan's integers go to the device, all layers
run, one token a sequence is sampled and comes back. Where the runner records CUDA graphs, rows run on them.

The floor is the time in which a large copy on the same card moves the step's least bytes: frozen weights
once, the keys and values of every context once, each distinct adapter once.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from loraplex_bench.models.random_pool import random_pool
from loraplex_bench.models.random_weights import RandomWeights, config_of
from loraplex_bench.ops.timers import measure_ceilings
from loraplex_kernels import dispatch
from loraplex_kernels.pool import MAX_RANK, LoraPool
from loraplex_server.core.step import StepPlan
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.run.kv_cache import allocate_kv, block_bytes
from loraplex_server.model.run.runner import ModelRunner
from loraplex_server.model.run.selfcheck import check_ragged

_BLOCK = 16
_PROFILED_STEPS = 5


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Settings of a run."""

    shape: str = "llama-3-8b"
    quantizations: tuple[str, ...] = ("nf4", "int4")
    batches: tuple[int, ...] = (64, 1, 16, 256)
    adapters: tuple[int, ...] = (0, 64, 16, 1)
    context: int = 1024
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: str = "auto"
    fused: bool = True
    steps: int = 30

    @classmethod
    def tiny(cls) -> StepTable:
        """For trying it out on a CPU."""
        return cls(
            shape="tiny", batches=(1, 3), adapters=(0, 2), context=40, rank=8, dtype=torch.float32, steps=3
        )


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One row; times are of one step.

    Attributes:
        adapters: distinct ones, `batch` at most.
        wall_ms: median on the host's clock, from the plan to the tokens.
        device_ms: median between the step's beginning and its end on the device; None where there is no such
            clock.
        kernel_ms: sum over its kernels; None where there is no profiler for them.
        recorded: it was replayed from a CUDA graph.
        floor_ms: what its least bytes take.
        weight_bytes, kv_bytes, adapter_bytes: those bytes.
    """

    quantization: str
    batch: int
    adapters: int
    context: int
    wall_ms: float
    device_ms: float | None
    kernel_ms: float | None
    recorded: bool
    floor_ms: float
    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.wall_ms * 1e3

    @property
    def kernel_share(self) -> float | None:
        """Share of wall time inside kernels."""
        return None if self.kernel_ms is None else self.kernel_ms / self.wall_ms

    def as_json(self) -> dict[str, Any]:
        """The row with what follows from it."""
        return {
            **dataclasses.asdict(self),
            "tokens_per_s": self.tokens_per_s,
            "times_floor": self.wall_ms / self.floor_ms,
            "kernel_share": self.kernel_share,
        }

    def line(self) -> str:
        """For the printed table."""
        kernels = "" if self.kernel_share is None else f", {self.kernel_share:.0%} of it in kernels"
        device = "" if self.device_ms is None else f" ({self.device_ms:.3f} on the device)"
        return (
            f"{self.quantization:5} batch {self.batch:3} adapters {self.adapters:3}: {self.wall_ms:8.3f} ms"
            f"{device}, {self.tokens_per_s:8.0f} tokens/s, {self.wall_ms / self.floor_ms:5.2f}x the floor of "
            f"{self.floor_ms:.3f} ms{kernels}{', recorded' if self.recorded else ''}"
        )


def measure(wanted: StepTable, device: torch.device, limit_s: float) -> Iterator[StepRow]:
    """Rows in the order of the table, the most wanted first, until `limit_s` seconds have passed."""
    end_s = time.monotonic() + limit_s
    bytes_per_s = measure_ceilings(device).bytes_per_s
    for quantization in wanted.quantizations:
        if time.monotonic() > end_s:
            return
        bench = StepBench(wanted, quantization, device)
        for batch in wanted.batches:
            for adapters in dict.fromkeys(min(count, batch) for count in wanted.adapters):
                if time.monotonic() > end_s:
                    return
                yield bench.measure(batch, adapters, bytes_per_s)
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()


class StepBench:
    """A runner over a random model, adapters and a KV cache full of random values."""

    def __init__(self, wanted: StepTable, quantization: str, device: torch.device) -> None:
        self._wanted, self._quantization, self._device = wanted, quantization, device
        config = config_of(wanted.shape)
        weight_format = WeightFormat(quantization, wanted.dtype, device)
        source = RandomWeights(config, wanted.dtype, device)
        self.base: BaseModel = EmptyModel.of(config, weight_format).fill(
            source, progress=False, fused=wanted.fused
        )
        layers = check_ragged(self.base)
        self._blocks = -(-(wanted.context + 1) // _BLOCK)
        kv_dtype = torch.float8_e4m3fn if wanted.kv_cache_dtype == "fp8" else wanted.dtype
        caches = allocate_kv(
            self.base.kv_shapes, max(wanted.batches) * self._blocks, _BLOCK, kv_dtype, device
        )
        for cache in caches:
            _fill(cache)
        self._token_bytes = block_bytes(self.base.kv_shapes, 1, kv_dtype)
        self.pool, self._adapter_bytes = _adapters(
            self.base, max(wanted.adapters), wanted.rank, wanted.dtype, device
        )
        self.runner = ModelRunner(
            self.base,
            caches,
            self.pool,
            block_size=_BLOCK,
            max_batch_tokens=max(wanted.batches),
            max_pairs_per_token=1,
            layers=layers,
        )
        # As the server does: every kernel of these steps is compiled, and then recorded where it can be.
        self.recorded = device.type == "cuda" and dispatch.backend(device) == "triton"
        if self.recorded:
            self.runner.record_graphs(tuple(sorted(wanted.batches)), wanted.context + 1)

    def plan(self, batch: int, adapters: int) -> StepPlan:
        """One token of each of `batch` sequences, which have the adapters in turn."""
        context, blocks = self._wanted.context, self._blocks
        rng = np.random.default_rng(batch)
        vocabulary = self.base.config.vocab_size
        tables = rng.permutation(batch * blocks).reshape(batch, blocks)
        position = context - 1
        uses = [row % adapters for row in range(batch)] if adapters else []
        order = sorted(uses)
        return StepPlan(
            token_ids=rng.integers(0, vocabulary, batch),
            positions=np.full(batch, position),
            slot_mapping=tables[:, position // _BLOCK] * _BLOCK + position % _BLOCK,
            query_start=np.arange(batch + 1),
            context_len=np.full(batch, context),
            block_start=np.arange(batch + 1) * blocks,
            blocks=tables.reshape(-1),
            run_start=np.arange(len(order)),
            run_end=np.arange(len(order)) + 1,
            run_pair_start=np.arange(len(order) + 1),
            pair_slot=np.array(order, np.int64),
            pair_weight=np.ones(len(order)),
            sample_row=np.arange(batch),
            temperature=np.zeros(batch),
            top_k=np.zeros(batch, np.int64),
            top_p=np.ones(batch),
            uniform=np.zeros(batch),
            num_logprobs=np.full(batch, -1),
            banned_start=np.zeros(batch + 1, np.int64),
            banned_ids=np.zeros(0, np.int64),
        )

    def measure(self, batch: int, adapters: int, bytes_per_s: float) -> StepRow:
        """One row."""
        plan = self.plan(batch, adapters)
        for _ in range(3):
            self.runner.run(plan)
        wall, on_device = [], []
        for _ in range(self._wanted.steps):
            started_s = time.perf_counter()
            output = self.runner.run(plan)
            wall.append(time.perf_counter() - started_s)
            if output.device_s is not None:
                on_device.append(output.device_s)
        kernel_s = kernel_seconds(lambda: self.runner.run(plan), _PROFILED_STEPS, self._device)
        embeddings = self.base.model.get_input_embeddings().weight
        weights = self.base.weight_bytes - embeddings.nbytes + batch * embeddings[0].nbytes
        kv_bytes = batch * self._wanted.context * self._token_bytes
        adapter_bytes = adapters * self._adapter_bytes
        return StepRow(
            quantization=self._quantization,
            batch=batch,
            adapters=adapters,
            context=self._wanted.context,
            wall_ms=statistics.median(wall) * 1e3,
            device_ms=statistics.median(on_device) * 1e3 if on_device else None,
            kernel_ms=None if kernel_s is None else kernel_s * 1e3,
            recorded=self.recorded,
            floor_ms=(weights + kv_bytes + adapter_bytes) / bytes_per_s * 1e3,
            weight_bytes=weights,
            kv_bytes=kv_bytes,
            adapter_bytes=adapter_bytes,
        )


def kernel_seconds(run: Callable[[], object], steps: int, device: torch.device) -> float | None:
    """Seconds that the device's kernels and copies take in one call of `run`; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    total_us = sum(
        event.self_device_time_total for event in profile.key_averages() if event.device_type.name == "CUDA"
    )
    return float(total_us) / steps / 1e6


def cost_of_adapters(rows: Sequence[StepRow], batch: int, adapters: int) -> dict[str, float]:
    """The share by which `adapters` distinct adapters make a step longer, by quantization."""
    found = {(row.quantization, row.batch, row.adapters): row.wall_ms for row in rows}
    return {
        quantization: found[quantization, batch, adapters] / found[quantization, batch, 0] - 1
        for quantization in dict.fromkeys(row.quantization for row in rows)
        if (quantization, batch, adapters) in found and (quantization, batch, 0) in found
    }


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure of the table and what it should be: at most `goal`, or with `least` at least that."""

    text: str
    value: float
    goal: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.least else self.value <= self.goal

    def line(self) -> str:
        """For the printed table."""
        bound = "at least" if self.least else "at most"
        verdict = (
            "met" if self.met else f"missed, by a factor of {max(self.value, self.goal) / self._smaller:.2f}"
        )
        return f"{self.text}: {self.value:.2f}, wanted {bound} {self.goal:g}: {verdict}"

    @property
    def _smaller(self) -> float:
        return max(min(self.value, self.goal), 1e-9)


def goals(rows: Sequence[StepRow], batch: int = 64) -> list[Goal]:
    """The goals of rows of `batch` sequences, as far as they are there."""
    found = []
    for row in rows:
        if row.batch == batch and row.adapters in (0, 64):
            what = f"{row.quantization}, batch {batch}, {row.adapters} adapters"
            found.append(Goal(f"{what}: step over floor", row.wall_ms / row.floor_ms, 1.5))
            if row.kernel_share is not None and not row.adapters:
                found.append(Goal(f"{what}: share in kernels", row.kernel_share, 0.95, least=True))
    for quantization, cost in cost_of_adapters(rows, batch, 16).items():
        found.append(Goal(f"{quantization}, batch {batch}: cost of 16 adapters over none", cost, 0.15))
    return found


def _fill(cache: torch.Tensor) -> None:
    """Random values, a block at a time where the type has no generator of its own."""
    if cache.dtype.itemsize > 1:
        cache.normal_()
        return
    for block in cache.split(256):
        block.copy_(torch.randn(block.shape, device=cache.device))


def _adapters(
    base: BaseModel, count: int, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[LoraPool, int]:
    """A pool of random adapters on every projection, and the bytes of one of them at its true rank."""
    entries = [(projection.in_features, projection.out_features) for projection in base.projections]
    pool = random_pool(entries, [rank] * max(count, 1), dtype, device, max_rank=MAX_RANK)
    return pool, sum(rank * sum(widths) for widths in entries) * dtype.itemsize
