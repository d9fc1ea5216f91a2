"""Times the products with 4-bit weights against dense ones.

``python -m loraplex_bench.ops.ops_quant``; ``--json FILE`` also writes the figures and the machine.
This is the CPU's table; on a GPU run ``python -m loraplex_bench.ops.ops_quant_cuda``, or call `measure_cuda`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex_bench.ops.ops_quant_cuda import measure_cuda
from loraplex_kernels import dense
from loraplex_kernels.quant import cpu_packed, int4, nf4

__all__ = ["main", "measure_cuda"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
SHAPES = ((4096, 4096), (768, 2048))

Product = Callable[[Tensor], Tensor]
Clock = Callable[[], float]


def main(arguments: list[str] | None = None) -> None:
    """Entry point; see ``--help``."""
    parser = argparse.ArgumentParser(description="Time products with 4-bit weights.")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls per figure (default: 15)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of one thread, for a machine that others use too (default: wall)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and environment here")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    results = [measure for n, k in SHAPES for measure in _measure_shape(n, k, options.repeats, clock)]
    _print_table(results)
    if options.json:
        report = {
            "environment": _environment(),
            "clock": options.clock,
            "unit": "milliseconds, median and least",
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _measure_shape(n: int, k: int, repeats: int, clock: Clock) -> Iterable[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) * 0.02
    products = dict(_products(weight))
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, k, generator=generator)
            times = _time_interleaved(products, x, repeats, clock)
            for name, samples in times.items():
                samples.sort()
                yield {
                    "product": name,
                    "shape": [n, k],
                    "rows": rows,
                    "median_ms": samples[len(samples) // 2],
                    "min_ms": samples[0],
                }


def _products(weight: Tensor) -> Iterable[tuple[str, Product]]:
    """Every way to multiply by ``weight``: fp32 [M, K] in, any float dtype [M, N] out."""
    half = weight.bfloat16()
    yield "dense fp32 (torch)", lambda x: torch.nn.functional.linear(x, weight)
    yield "dense fp32 (loraplex)", lambda x: dense.linear(x, weight)
    yield "dense bf16", lambda x: torch.nn.functional.linear(x.bfloat16(), half)
    w_nf4, w_nested = nf4.quantize(weight), nf4.quantize(weight, double_quant=True)
    yield "nf4", lambda x: nf4.matmul(x, w_nf4)
    yield "nf4 double quant", lambda x: nf4.matmul(x, w_nested)
    w_int4 = int4.quantize(weight)
    yield "int4 fp32", lambda x: int4.matmul(x, w_int4)
    if cpu_packed.supported(w_int4.shape, w_int4.group):
        packed = cpu_packed.PackedInt4Weight.from_int4(w_int4)
        yield "int4 packed, as chosen", lambda x: cpu_packed.matmul(x, packed)
        yield "int4 packed, torch's kernel", lambda x: cpu_packed.matmul_packed(x, packed)
        if cpu_packed.layout_block() is not None:
            yield "int4 packed, tiled", lambda x: cpu_packed.matmul_tiled(x, packed)
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        yield "bitsandbytes nf4", lambda x: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


def _time_interleaved(
    products: dict[str, Product], x: Tensor, repeats: int, clock: Clock
) -> dict[str, list[float]]:
    """Milliseconds of each call. The products take turns, so that a busy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(repeats + 2):
        for name, product in products.items():
            start = clock()
            product(x)
            if turn >= 2:  # the first turns warm caches and build kernels
                times[name].append((clock() - start) * 1e3)
    return times


def _print_table(results: list[dict[str, Any]]) -> None:
    for n, k in SHAPES:
        of_shape = [result for result in results if result["shape"] == [n, k]]
        print(f"\n{n} x {k}, ms (median; least below), {torch.get_num_threads()} thread(s)")
        print(f"{'rows':<30}" + "".join(f"{rows:>9}" for rows in ROWS))
        for name in dict.fromkeys(result["product"] for result in of_shape):
            row = [result for result in of_shape if result["product"] == name]
            print(f"{name:<30}" + "".join(f"{result['median_ms']:>9.2f}" for result in row))
            print(" " * 30 + "".join(f"{result['min_ms']:>9.2f}" for result in row))


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "tile_dtype": str(cpu_packed.tile_dtype()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
