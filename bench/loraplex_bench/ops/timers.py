"""Timing of calls: on a GPU as a replayed CUDA graph, on a CPU in turns with their peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]
Clock = Callable[[], float]

REPEATS = 20
"""Timed passes per figure, enough for a steady median of graphs that take microseconds."""


@dataclass(frozen=True)
class Sample:
    """Microseconds of one call."""

    median_us: float
    least_us: float

    @classmethod
    def of(cls, passes_s: Iterable[float], calls: int) -> Sample:
        """From the seconds of passes over `calls` calls."""
        us = [seconds / calls * 1e6 for seconds in passes_s]
        return cls(statistics.median(us), min(us))


@dataclass(frozen=True)
class Ceilings:
    """A device's limits in practice: bytes per second of a large copy (read and written), and operations per
    second of a large bf16 matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, num_bytes: float, flops: float = 0.0) -> float:
        """No kernel can be faster."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s) * 1e6


def measure_ceilings(device: torch.device) -> Ceilings:
    """On CUDA a copy of 1 GiB and a product of 8192 x 8192; on a CPU smaller ones."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 24, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copy = sample(lambda: target.copy_(source), device=device)
    product = sample(lambda: left @ right, device=device)
    return Ceilings(2 * size / copy.median_us * 1e6, 2 * side**3 / product.median_us * 1e6)


def sample(*calls: Call, device: torch.device, repeats: int = REPEATS) -> Sample:
    """One call in a pass over all `calls`, one after the other."""
    if device.type == "cuda":
        return sample_graph(calls, repeats)
    return sample_in_turns({"": calls}, repeats)[""]


def sample_graph(calls: Sequence[Call], repeats: int = REPEATS) -> Sample:
    """`calls` captured as one CUDA graph, which is replayed `repeats` times."""
    # On a side stream, as torch asks of what is to be captured; what compiles or tunes does so here.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    event = partial(torch.cuda.Event, enable_timing=True)
    # All are queued at once, so that no replay waits for the host.
    events = [(event(), event()) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return Sample.of((start.elapsed_time(stop) / 1e3 for start, stop in events), len(calls))


def sample_in_turns(
    passes: Mapping[str, Sequence[Call]], repeats: int = REPEATS, clock: Clock = time.perf_counter
) -> dict[str, Sample]:
    """Each pass once in a turn, so that a busy machine disturbs all alike; two turns before warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(-2, repeats):
        for name, calls in passes.items():
            started = clock()
            for call in calls:
                call()
            if turn >= 0:
                seconds[name].append(clock() - started)
    return {name: Sample.of(times, len(passes[name])) for name, times in seconds.items()}
