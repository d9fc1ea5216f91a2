"""`make bench-gpu`: first that the GPU path is right, then how fast its kernels are.

    python -m loraplex_bench.gpu --output bench/results

Seven sections, `--only` picks some:

- tests      the op tests and the parity tests of the engine, on the GPU (they choose it by themselves)
- lora       the LoRA op with cold adapters: what it adds to a step of a Llama-3-8B and to a prefill, and
             tokens x mixes x ranks beside the peers that are at hand (`ops.lora`)
- quant      the 4-bit products beside cuBLAS, gemlite and bitsandbytes (`ops.quant`)
- attention  paged attention beside torch's (`ops.attention`)
- fused      sums and norms, rotations and KV writes, gates, beside transformers' modules (`ops.fused`)
- step       whole decode steps of a random Llama-3-8B, by batch and number of adapters
             (`scenarios.decode_steps`)
- server     the server on that model under load, and transformers + PEFT with the same requests
             (`scenarios.gpu_server`)

Timings of kernels are of CUDA graphs. One JSON named after the card holds the environment and every section
that was run, written anew after each row: a run cut short leaves what it has, and a later one adds to it.
Installs nothing: it uses the interpreter and the packages it is run with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from loraplex_bench.ops import lora_cases
from loraplex_bench.ops.catalogue import OPS
from loraplex_bench.ops.registry import Figure, Op, Row, Setting, rows
from loraplex_bench.ops.report import Document, Printer, from_json, section
from loraplex_bench.ops.timers import Ceilings, measure_ceilings
from loraplex_bench.peers.folder import BITSANDBYTES

OP_SECTIONS = {
    "lora": ("lora-share", "lora"),
    "quant": ("bitsandbytes", "quant"),
    "attention": ("attention",),
    "fused": ("fused",),
}
"""The ops of each section of kernels."""

SECTIONS = ("tests", *OP_SECTIONS, "step", "server")
TESTS = (
    "tests/ops",
    "tests/engine/test_parity.py",
    "tests/engine/test_low_precision.py",
    "tests/engine/test_triton_engine.py",
    "tests/engine/test_fusion.py",
    "tests/engine/test_graphs.py",
    "tests/engine/test_overlap.py",
    "tests/engine/test_memory.py",
    "tests/engine/test_in_8_bits.py",
)
_ROOT = Path(__file__).parents[2]


def run_tests(limit_s: float) -> dict[str, object]:
    """The tests that prove the GPU path; what they printed last, and whether all passed."""
    started_s = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not finished after {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1] if lines else done.stderr[-500:],
        "failures": failures,
        "seconds": time.monotonic() - started_s,
    }


def time_ops(
    document: Document,
    name: str,
    setting: Setting,
    limit_s: float,
    *,
    quick: bool = False,
    tiny: bool = False,
) -> None:
    """A section of kernels, printed and written row by row."""
    end_s = time.monotonic() + limit_s
    ceilings = measure_ceilings(setting.device)
    print(
        f"a large copy moves {ceilings.bytes_per_s / 1e12:.2f} TB/s, read and written, "
        f"a large product reaches {ceilings.flops_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    content: dict[str, Any] = {}
    show = Printer()
    for op in (OPS[each] for each in OP_SECTIONS[name]):
        wanted = op.tiny if tiny else op.cases["cuda"]()
        if quick and op.name == "lora":
            wanted = lora_cases.cases(quick=True)
        left_s = end_s - time.monotonic()
        found: list[Row] = []
        for row in _rows(op, wanted, setting, ceilings, left_s):
            found.append(row)
            show(row, op.best)
            content[op.name] = section(found, ceilings)
            document.write(name, content)
        for label, value in content.get(op.name, {}).get("summary", {}).items():
            print(f"{op.name}, {label}: {value:.2f}")
        if len(found) < len(wanted):
            print(f"{op.name}: {len(found)} of {len(wanted)} rows within the time limit")


def _rows(
    op: Op, wanted: Sequence[Any], setting: Setting, ceilings: Ceilings, left_s: float
) -> Iterator[Row]:
    if op.name == "bitsandbytes" and setting.device.type == "cuda":
        return rows_apart(op, left_s / 3)
    return rows(op, wanted, setting, ceilings, left_s)


def rows_apart(op: Op, limit_s: float) -> Iterator[Row]:
    """Measures an op in a process of its own, and passes on what it printed, also when it did not finish."""
    command = [sys.executable, "-m", "loraplex_bench.ops", op.name, "--json", "-"]
    path = os.pathsep.join([*filter(None, sys.path), str(BITSANDBYTES)])
    env = {**os.environ, "PYTHONPATH": path}
    reason = ""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
        output, reason = done.stdout, done.stderr.strip()[-300:] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        reason = f"{limit_s:.0f} s are over"
    yield from (from_json(json.loads(line)) for line in output.splitlines() if line.startswith("{"))
    if reason:
        yield Row(op.name, "all", "", {}, (Figure(op.name, "own", not_run=reason),))


def time_steps(
    document: Document,
    limit_s: float,
    device: torch.device,
    *,
    kv_cache_dtype: str = "auto",
    fused: bool = True,
    tiny: bool = False,
) -> None:
    """The section of whole decode steps, printed and written row by row."""
    # Here, not above: the kernels' sections run without the server's packages.
    from loraplex_bench.scenarios import decode_steps

    wanted = decode_steps.StepTable.tiny() if tiny else decode_steps.StepTable()
    wanted = dataclasses.replace(wanted, kv_cache_dtype=kv_cache_dtype, fused=fused)
    section = "step" if kv_cache_dtype == "auto" else f"step-{kv_cache_dtype}"
    section += "" if fused else "-unfused"
    rows: list[decode_steps.StepRow] = []
    for row in decode_steps.measure(wanted, device, limit_s):
        rows.append(row)
        print(row.line(), flush=True)
        document.write(section, [each.as_json() for each in rows])
    for goal in decode_steps.goals(rows):
        print(goal.line())
    expected = [
        (quantization, batch, adapters)
        for quantization in wanted.quantizations
        for batch in wanted.batches
        for adapters in dict.fromkeys(min(count, batch) for count in wanted.adapters)
    ]
    if len(rows) < len(expected):
        print(f"{len(rows)} of {len(expected)} rows within the time limit")


def time_server(document: Document, limit_s: float, device: torch.device, *, tiny: bool = False) -> None:
    """The section of the server, printed and written row by row."""
    from loraplex import LoraplexError
    from loraplex_bench.load.launcher import LaunchError
    from loraplex_bench.scenarios import gpu_server

    wanted = gpu_server.ServerTable.tiny() if tiny else gpu_server.ServerTable()
    rows: list[gpu_server.ServerRow] = []

    def say(row: gpu_server.ServerRow) -> None:
        rows.append(row)
        print(row.line(), flush=True)
        document.write("server", gpu_server.as_json(rows, wanted))

    try:
        gpu_server.measure(wanted, device, limit_s, say)
    except (LaunchError, LoraplexError, OSError) as error:
        say(gpu_server.ServerRow("loraplex", wanted.quantization, "all at once", not_run=str(error)[-1500:]))
    if (line := gpu_server.goal_line(rows)) is not None:
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when all tests passed, 1 when one did not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the JSON")
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="a section to run; may be repeated (default: all)"
    )
    parser.add_argument("--test-limit", type=float, default=280.0, metavar="S", help="seconds for the tests")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=240.0,
        metavar="S",
        help="seconds of a section of timings, after which no further row is begun",
    )
    parser.add_argument("--quick", action="store_true", help="twelve rows of the LoRA table")
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of the section step"
    )
    parser.add_argument(
        "--unfused",
        action="store_true",
        help="section step: the model's own code between projections, to compare with",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="try all but the tests out on tiny models, on a CPU if need be",
    )
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        return _try_out(arguments)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: `make bench-gpu` needs one", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    sections = arguments.only or SECTIONS
    card = torch.cuda.get_device_name()
    document = Document(arguments.output, card)
    passed = True
    if "tests" in sections:
        tests = run_tests(arguments.test_limit)
        passed = bool(tests["passed"])
        print(f"{card}: {tests['summary']}", flush=True)
        document.write("tests", tests)
    with torch.inference_mode():
        for name in OP_SECTIONS:
            if name in sections:
                time_ops(document, name, Setting.of(device), arguments.time_limit, quick=arguments.quick)
    torch.cuda.empty_cache()
    if "step" in sections:
        options = {"kv_cache_dtype": arguments.kv_cache_dtype, "fused": not arguments.unfused}
        time_steps(document, arguments.time_limit, device, **options)
    if "server" in sections:
        time_server(document, arguments.time_limit, device)
    print(f"written to {document.path}")
    return 0 if passed else 1


def _try_out(arguments: argparse.Namespace) -> int:
    """All but the tests, at their smallest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document = Document(arguments.output, f"tiny on {device.type}")
    sections = arguments.only or SECTIONS
    with torch.inference_mode():
        for name in OP_SECTIONS:
            if name in sections:
                time_ops(document, name, Setting.dry(), arguments.time_limit, tiny=True)
    if "step" in sections:
        time_steps(document, arguments.time_limit, device, kv_cache_dtype=arguments.kv_cache_dtype, tiny=True)
    if "server" in sections:
        time_server(document, arguments.time_limit, device, tiny=True)
    print(f"written to {document.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
