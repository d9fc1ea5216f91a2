"""Times the 4-bit products on a GPU against cuBLAS and two peers, at the shapes of a Llama-3-8B.

`measure_cuda` yields one `QuantTiming` after the other until its time is up, so that what was measured is
kept whatever happens next. A pass multiplies by so many copies of the weight, one after the other, that none
is still in the second-level cache when its turn comes again, and is replayed as a CUDA graph. Every product
is compared with the dense one before it is timed.

Peers: gemlite (int4; installed, or carried in ``bench/.peers``) in this process, bitsandbytes (nf4;
installed, or carried in ``bench/.peers/bnb``) in one of its own, since it brings a CUDA library along. What
cannot run is told with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex_kernels import quant
from loraplex_kernels.quant import BlockedWeight, Plan, int4, nf4

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
SHAPES = {"o": (4096, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(output width, input width) of a Llama-3-8B's projections, siblings as one."""

PEERS = Path(__file__).parents[2] / ".peers"
_GROUP = 128
# Copies of a weight together exceed any GPU's second-level cache by far.
_COLD_BYTES = 256 << 20
_MAX_COPIES = 32
# A result further from the dense product's than this (of its norm) is wrong, not rounded.
_TOLERANCE = 2e-2

Product = Callable[[Any, Tensor], Tensor]
"""Of a weight, however held, and x."""
Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class QuantTiming:
    """One figure of the table.

    Attributes:
        product: "nf4", "nf4-double", "int4", "cublas-bf16", "gemlite-int4" or "bitsandbytes-nf4".
        us: median time of one product, or None where `not_run` says why there is none.
        roofline: share of the time that its bytes, or its FLOP, need at the measured ceilings.
        speedup: how many times as fast as cuBLAS in bf16.
        error: of the result, as a share of the dense product's norm.
        plan: what the kernels chose; of a peer, its version.
    """

    product: str
    site: str
    shape: Shape
    rows: int
    us: float | None = None
    roofline: float | None = None
    speedup: float | None = None
    error: float | None = None
    plan: str | None = None
    not_run: str | None = None


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes a second of a large copy, and FLOP a second of a large bf16 product."""

    bytes_per_s: float
    flop_per_s: float

    def floor_us(self, num_bytes: int, flop: float) -> float:
        return max(num_bytes / self.bytes_per_s, flop / self.flop_per_s) * 1e6


def measure_cuda(
    limit_s: float = 300.0,
    *,
    rows: Sequence[int] = ROWS,
    shapes: dict[str, Shape] | None = None,
    products: Sequence[str] = ("nf4", "int4", "nf4-double"),
    peers: bool = True,
    device: torch.device | None = None,
) -> Iterator[QuantTiming]:
    """Measures until done or `limit_s` seconds have passed; bitsandbytes comes first, in a third of them.

    Args:
        device: default: the CUDA device. A CPU is for trying this out.
    """
    end_s = time.monotonic() + limit_s
    device = device or torch.device("cuda")
    shapes = shapes or SHAPES
    if peers:
        yield from _bitsandbytes_apart(shapes, rows, limit_s / 3)
    with torch.inference_mode():
        ceilings = measure_ceilings(device)
        for site, shape in shapes.items():
            for timing in _measure_site(site, shape, rows, products, peers, device, ceilings):
                yield timing
                if time.monotonic() > end_s:
                    yield QuantTiming("all", site, shape, timing.rows, not_run=f"{limit_s:.0f} s are over")
                    return


def measure_ceilings(device: torch.device) -> Ceilings:
    """A large copy, and a large bf16 product."""
    large = device.type == "cuda"
    source = torch.randn(1 << (28 if large else 20), device=device)
    target = torch.empty_like(source)
    copy_us = time_us([lambda: target.copy_(source)], device)
    side = 8192 if large else 256
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    product_us = time_us([lambda: a @ b], device)
    return Ceilings(2 * source.nbytes / copy_us * 1e6, 2 * side**3 / product_us * 1e6)


def time_us(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 20) -> float:
    """Median time of one call, in a pass over all of them; on CUDA the pass is replayed as a graph."""
    for call in (*calls, *calls[:2]):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(3):
            started_s = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - started_s) * 1e6)
        return statistics.median(times) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    event: Any = torch.cuda.Event
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    passes_ms: list[float] = [start.elapsed_time(stop) for start, stop in events]
    return statistics.median(passes_ms) * 1e3 / len(calls)


def candidates(rows: int) -> Iterator[Plan]:
    """Plans worth trying for a number of rows, for a table measured rather than reasoned."""
    if rows <= 16:
        for columns in (16, 32, 64):
            for warps in (4, 8):
                for stages in (3, 4, 5):
                    yield Plan("split", max(8, rows), columns, warps, stages)
    if rows <= 64:
        height = max(16, 1 << (rows - 1).bit_length())
        for columns in (64, 128):
            for planes in (1, 2, 4, 8):
                for unroll in (1, 2):
                    yield Plan("tile", height, columns, 4, 4, unroll, planes)
        yield Plan("tile", height, 128, 8, 3, 1, 4)
        yield Plan("tile", height, 128, 4, 4, 2, 4, lookup="gather")
    elif rows < 4096:
        for height in (64, 128):
            for planes in (1, 2, 4):
                yield Plan("tile", height, 128, 8, 3, 1, planes)
        yield Plan("tile", 64, 128, 4, 4)
        yield Plan("library")


def tune(
    limit_s: float,
    *,
    rows: Sequence[int] = ROWS,
    shapes: dict[str, Shape] | None = None,
    products: Sequence[str] = ("nf4", "int4"),
    device: torch.device | None = None,
) -> Iterator[tuple[str, str, int, list[tuple[float, str]]]]:
    """(product, site, rows, [(us, plan), fastest first]) of every candidate that builds and is right."""
    end_s = time.monotonic() + limit_s
    device = device or torch.device("cuda")
    with torch.inference_mode():
        for site, shape in (shapes or SHAPES).items():
            dense = _random_weight(shape, device)
            for name in products:
                weights = _copies(_quantised(name, dense))
                truth = quant.dequantize(weights[0], torch.float32)
                for count in rows:
                    x = torch.randn(count, shape[1], device=device).bfloat16()
                    found = []
                    for plan in candidates(count):
                        if time.monotonic() > end_s:
                            return
                        try:
                            product = functools.partial(_blocked, plan=plan)
                            error = _error(product(weights[0], x), x, truth)
                            us = time_us(_calls(product, weights, x), device, repeats=8)
                        except Exception as problem:  # a shape that does not fit the device
                            found.append((float("inf"), f"{_describe(plan)}: {type(problem).__name__}"))
                            continue
                        if error <= _TOLERANCE:
                            found.append((us, _describe(plan)))
                    yield name, site, count, sorted(found)


def _measure_site(
    site: str,
    shape: Shape,
    rows: Sequence[int],
    products: Sequence[str],
    peers: bool,
    device: torch.device,
    ceilings: Ceilings,
) -> Iterator[QuantTiming]:
    dense = _random_weight(shape, device)
    inputs = {count: torch.randn(count, shape[1], device=device).bfloat16() for count in rows}
    half = _copies(dense.bfloat16())
    cublas = {}
    for count, x in inputs.items():
        us = cublas[count] = time_us(_calls(_dense, half, x), device)
        floor = _floor(ceilings, count, shape, half[0].nbytes)
        yield QuantTiming("cublas-bf16", site, shape, count, us, floor / us, 1.0)
    del half

    def run(
        name: str, product: Product, weights: list[Any], num_bytes: int, truth: Tensor
    ) -> Iterator[QuantTiming]:
        for count, x in inputs.items():
            timing = QuantTiming(name, site, shape, count)
            try:
                error = _error(product(weights[0], x), x, truth)
                if not error <= _TOLERANCE:
                    yield dataclasses.replace(timing, error=error, not_run="the result is wrong")
                    continue
                us = time_us(_calls(product, weights, x), device)
            except Exception as problem:
                yield dataclasses.replace(timing, not_run=f"{type(problem).__name__}: {problem}"[:300])
                continue
            floor = _floor(ceilings, count, shape, num_bytes)
            plan = _plan(weights[0], count) if isinstance(weights[0], BlockedWeight) else None
            yield dataclasses.replace(
                timing, us=us, roofline=floor / us, speedup=cublas[count] / us, error=error, plan=plan
            )

    for name in products:
        weights = _copies(_quantised(name, dense))
        truth = quant.dequantize(weights[0], torch.float32)
        yield from run(name, _blocked, weights, weights[0].nbytes, truth)
        del weights
    if peers:
        affine = int4.quantize(dense, group=_GROUP)
        try:
            layers = _gemlite_layers(affine)
        except Exception as problem:
            reason = f"gemlite: {type(problem).__name__}: {problem}"[:300]
            yield QuantTiming("gemlite-int4", site, shape, 0, not_run=reason)
            return
        num_bytes = shape[0] * shape[1] // 2 + 4 * affine.scale.numel()
        version = f"gemlite {sys.modules['gemlite'].__version__}"
        for timing in run("gemlite-int4", _layer, layers, num_bytes, int4.dequantize(affine)):
            yield dataclasses.replace(timing, plan=version)


def _gemlite_layers(w: int4.Int4Weight) -> list[Any]:
    """Copies of the weight as gemlite holds it, by its authors' table for the card or as they advise."""
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    import gemlite
    from gemlite import core
    from gemlite.core import DType, GemLiteLinear

    if not core.GEMLITE_TRITON_CONFIG_CACHE:
        gemlite.set_autotune("max")
    n, k = w.shape
    codes = torch.stack((w.packed >> 4, w.packed & 15), dim=2).view(n, k)
    scale = w.scale.clamp(min=1e-8)
    zero = 8 - w.zero / scale
    layers = []
    for _ in range(_num_copies(w.packed.nbytes)):
        layer = GemLiteLinear(
            4,
            group_size=w.group,
            in_features=k,
            out_features=n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        layer.pack(codes.clone(), scale.view(-1, 1).bfloat16(), zero.view(-1, 1).bfloat16(), None)
        layers.append(layer)
    return layers


def _bitsandbytes_apart(
    shapes: dict[str, Shape], rows: Sequence[int], limit_s: float
) -> Iterator[QuantTiming]:
    """Runs this file in a process of its own and passes on what it printed, also when it did not finish."""
    command = [sys.executable, "-m", __spec__.name, "--bitsandbytes", json.dumps([shapes, list(rows)])]
    path = os.pathsep.join([*filter(None, sys.path), str(PEERS / "bnb")])
    env = {**os.environ, "PYTHONPATH": path}
    reason = ""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
        output, reason = done.stdout, done.stderr.strip()[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        reason = f"{limit_s:.0f} s are over"
    for line in output.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            yield QuantTiming(**{**found, "shape": tuple(found["shape"])})
    if reason:
        yield QuantTiming("bitsandbytes-nf4", "all", (0, 0), 0, not_run=f"bitsandbytes: {reason}")


def _measure_bitsandbytes(shapes: dict[str, Shape], rows: Sequence[int]) -> Iterator[QuantTiming]:
    import bitsandbytes

    def multiply(pair: Any, x: Tensor) -> Tensor:
        product: Tensor = bitsandbytes.matmul_4bit(x, pair[0].t(), quant_state=pair[1])
        return product

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        ceilings = measure_ceilings(device)
        for site, shape in shapes.items():
            dense = _random_weight(shape, device).bfloat16()
            quantised = [
                bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4")
                for _ in range(_num_copies(dense.nbytes // 4))
            ]
            truth = bitsandbytes.functional.dequantize_4bit(*quantised[0]).float()
            half = _copies(dense)
            for count in rows:
                x = torch.randn(count, shape[1], device=device).bfloat16()
                version = f"bitsandbytes {bitsandbytes.__version__}"
                timing = QuantTiming("bitsandbytes-nf4", site, (shape[0], shape[1]), count, plan=version)
                error = _error(multiply(quantised[0], x), x, truth)
                if not error <= _TOLERANCE:
                    yield dataclasses.replace(timing, error=error, not_run="the result is wrong")
                    continue
                us = time_us(_calls(multiply, quantised, x), device)
                cublas = time_us(_calls(_dense, half, x), device)
                floor = _floor(ceilings, count, shape, dense.nbytes // 4 + dense.numel() // 16)
                yield dataclasses.replace(
                    timing, us=us, roofline=floor / us, speedup=cublas / us, error=error
                )


def _random_weight(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device) * 0.02


def _quantised(name: str, dense: Tensor) -> BlockedWeight:
    if name == "int4":
        return quant.arrange_int4(int4.quantize(dense, group=_GROUP))
    return quant.arrange_nf4([nf4.quantize(dense, double_quant=name == "nf4-double")])


def _num_copies(num_bytes: int) -> int:
    return max(2, min(_MAX_COPIES, -(-_COLD_BYTES // num_bytes)))


def _copies(weight: Any) -> list[Any]:
    """As many as it takes for none to stay in the cache."""
    if isinstance(weight, Tensor):
        return [weight.clone() for _ in range(_num_copies(weight.nbytes))]

    def copied() -> BlockedWeight:
        zero, nested = weight.zero, weight.nested
        return BlockedWeight(
            format=weight.format,
            shape=weight.shape,
            group=weight.group,
            codes=weight.codes.clone(),
            scale=weight.scale.clone(),
            zero=None if zero is None else zero.clone(),
            nested=nested and dataclasses.replace(nested, absmax=nested.absmax.clone()),
        )

    return [copied() for _ in range(_num_copies(weight.nbytes))]


def _dense(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight)


def _blocked(weight: BlockedWeight, x: Tensor, plan: Plan | None = None) -> Tensor:
    return quant.matmul(x, weight, plan=plan)


def _layer(layer: Any, x: Tensor) -> Tensor:
    product: Tensor = layer(x)
    return product


def _calls(product: Product, weights: Iterable[Any], x: Tensor) -> list[Callable[[], Tensor]]:
    return [functools.partial(product, weight, x) for weight in weights]


def _error(y: Tensor, x: Tensor, truth: Tensor) -> float:
    exact = x.float() @ truth.t()
    return float((y.float() - exact).norm() / exact.norm())


def _floor(ceilings: Ceilings, rows: int, shape: Shape, weight_bytes: int) -> float:
    n, k = shape
    return ceilings.floor_us(weight_bytes + 2 * rows * (n + k), 2.0 * rows * n * k)


def _plan(w: BlockedWeight, rows: int) -> str:
    from loraplex_kernels.quant import tiles

    processors = 132
    if w.device.type == "cuda":
        processors = torch.cuda.get_device_properties(w.device).multi_processor_count
    return _describe(tiles.choose(rows, w.shape[0], w.blocks, torch.bfloat16, processors))


def _describe(plan: Plan) -> str:
    if plan.family == "library":
        return "library"
    return (
        f"{plan.family} {plan.rows}x{plan.columns} w{plan.warps} s{plan.stages} u{plan.unroll} "
        f"p{plan.planes} {plan.lookup}"
    )


def row(timing: QuantTiming) -> str:
    """A line of the printed table."""
    n, k = timing.shape
    head = f"{timing.product:<18}{timing.site:<9}{n:>6}x{k:<6}{timing.rows:>5}"
    if timing.us is None:
        return f"{head}  not run: {timing.not_run}"
    return (
        f"{head}{timing.us:>10.1f} us {timing.roofline or 0:>6.0%} of the roofline "
        f"{timing.speedup or 0:>6.2f}x cuBLAS  {timing.plan or ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; see ``--help``. Returns 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Time 4-bit products on a GPU.")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds (default: 300)")
    parser.add_argument("--tune", action="store_true", help="try the candidate plans instead")
    parser.add_argument("--no-peers", action="store_true", help="leave gemlite and bitsandbytes out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a line of JSON for each figure")
    parser.add_argument("--bitsandbytes", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bitsandbytes:
        shapes, rows = json.loads(options.bitsandbytes)
        for timing in _measure_bitsandbytes(shapes, rows):
            print(json.dumps(dataclasses.asdict(timing)), flush=True)
        return 0
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here; on a CPU use loraplex_bench.ops.ops_quant", file=sys.stderr)
        return 2
    lines = options.json.open("w") if options.json else None
    try:
        if options.tune:
            for name, site, count, found in tune(options.limit):
                print(
                    name, site, count, *(f"\n    {us:8.1f} us  {plan}" for us, plan in found[:4]), flush=True
                )
                _write(lines, {"product": name, "site": site, "rows": count, "plans": found})
        else:
            for timing in measure_cuda(options.limit, peers=not options.no_peers):
                print(row(timing), flush=True)
                _write(lines, dataclasses.asdict(timing))
    finally:
        if lines is not None:
            lines.close()
    return 0


def _write(lines: Any, figure: dict[str, Any]) -> None:
    if lines is not None:
        lines.write(json.dumps(figure) + "\n")
        lines.flush()


if __name__ == "__main__":
    raise SystemExit(main())
