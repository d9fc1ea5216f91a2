"""`make bench-gpu`: first that the GPU path is right, then how fast its kernels are.

    python -m loraplex_bench.gpu --output bench/results

Runs the op tests and the parity tests of the engine on the GPU (they choose it by themselves), then times the
LoRA op under CUDA graphs with cold adapters: whole steps of a Llama-3-8B, its share of a prefill, and the
table of tokens x mixes x ranks beside the peers that are at hand (`lora_peers`). Writes one JSON named after
the card, with the environment, anew after each row, so that a run cut short leaves what it has. Installs
nothing: it uses the interpreter and the packages it is run with.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraplex_bench import lora_table
from loraplex_bench.environment import environment
from loraplex_bench.lora_table import Row
from loraplex_bench.report import table, write_json

TESTS = (
    "tests/ops",
    "tests/engine/test_parity.py",
    "tests/engine/test_low_precision.py",
    "tests/engine/test_triton_engine.py",
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


def whole_steps(ceiling: float, device: torch.device) -> dict[str, Any]:
    """The figures that speak of a model and not of a layer."""
    steps = []
    for scaled in (False, True):
        step = lora_table.whole_step("llama-3-8b", 64, 16, ceiling, device, scaled=scaled)
        steps.append(asdict(step))
        print(
            f"{step.label}: {step.ms:.2f} ms a step, {step.floor_ms / step.ms:.0%} of the roofline",
            flush=True,
        )
        torch.cuda.empty_cache()
    share = lora_table.prefill_share("llama-3-8b", 4096, 8, 16, device)
    print(
        f"prefill of {share.tokens} tokens, {share.adapters} adapters of rank {share.rank}: "
        f"{share.lora_us:.0f} us a layer, {share.lora_us / share.dense_us:.1%} of the dense bf16 products",
        flush=True,
    )
    launches = lora_table.empty_step_launches(device)
    print(f"a step without adapters: {launches} LoRA launches", flush=True)
    torch.cuda.empty_cache()
    return {"steps": steps, "prefill": asdict(share), "launches_without_adapters": launches}


def line_of(row: Row, ceiling: float) -> tuple[str, ...]:
    """One line of the printed table."""
    own = row.us.get(lora_table.OWN)
    ratios = ", ".join(
        f"{peer} {row.speedup(peer):.2f}x" for peer in row.us if peer != lora_table.OWN and own is not None
    )
    return (
        row.case.model,
        str(row.case.tokens),
        row.case.mix,
        row.case.ranks,
        f"{own:.1f}" if own else "-",
        f"{row.bytes_per_layer / own / 1e3:.0f}" if own else "-",
        f"{row.share(ceiling):.0%}" if own else "-",
        ratios or "-",
    )


def main() -> int:
    """Returns 0 when all tests passed, 1 when one did not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the JSON")
    parser.add_argument("--no-tests", action="store_true", help="timings alone")
    parser.add_argument("--test-limit", type=float, default=280.0, metavar="S", help="seconds for the tests")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=240.0,
        metavar="S",
        help="seconds after which no further row of the table is begun",
    )
    parser.add_argument("--quick", action="store_true", help="twelve rows of the table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: `make bench-gpu` needs one", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    card = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    path = arguments.output / f"gpu-{name}.json"
    document: dict[str, Any] = {"environment": environment()}
    tests: dict[str, object] | None = None if arguments.no_tests else run_tests(arguments.test_limit)
    if tests is not None:
        print(f"{card}: {tests['summary']}", flush=True)
    document["tests"] = tests

    deadline = time.monotonic() + arguments.time_limit
    wanted = lora_table.cases(arguments.quick)
    rows: list[Row] = []
    with torch.inference_mode():
        ceiling = lora_table.copy_ceiling(device)
        document["copy_bytes_per_s"] = ceiling
        print(f"a large copy moves {ceiling / 1e12:.2f} TB/s, read and written", flush=True)
        document["whole"] = whole_steps(ceiling, device)
        write_json(path, document)
        reasons: dict[str, str] = {}
        for row in lora_table.measure_all(wanted, torch.bfloat16, device, deadline):
            rows.append(row)
            print("  ".join(line_of(row, ceiling)), flush=True)
            for peer, reason in row.not_run.items():
                if reasons.get(peer) != reason:
                    reasons[peer] = reason
                    print(f"  not run: {peer}: {reason}", flush=True)
            document["lora"] = [lora_table.as_json(each, ceiling) for each in rows]
            document["summary"] = lora_table.summary(rows, ceiling)
            write_json(path, document)
    columns = ("model", "tokens", "mix", "ranks", "us a layer", "GB/s", "roofline", "faster than")
    print(table(columns, [line_of(row, ceiling) for row in rows]))
    for label, value in document.get("summary", {}).items():
        print(f"{label}: {value:.2f}")
    if len(rows) < len(wanted):
        print(f"{len(rows)} of {len(wanted)} rows within the time limit")
    print(f"written to {path}")
    return 0 if tests is None or tests["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
