"""`make bench-gpu`: first that the GPU path is right, then how fast its kernels are.

    python -m loraplex_bench.gpu --output bench/results

Runs the op tests and the parity tests of the engine on the GPU (they choose it by themselves), then times the
LoRA op of a Llama-3-8B and a 1B model, bf16, under CUDA graphs, against the dense bf16 product of the same
site. Writes one JSON named after the card, with the environment. Installs nothing: it uses the interpreter
and the packages it is run with.
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

import torch

from loraplex_bench.environment import environment
from loraplex_bench.ops_lora import Timing, measure
from loraplex_bench.report import table, write_json

TESTS = (
    "tests/ops",
    "tests/engine/test_parity.py",
    "tests/engine/test_low_precision.py",
    "tests/engine/test_triton_engine.py",
)
MODELS = ("llama-3-8b", "llama-3-1b")
# (tokens, distinct adapters of ranks 4 to 32)
MIXES = ((1, 1), (16, 16), (64, 1), (64, 64), (256, 8), (1024, 8), (4096, 8))
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


def run_timings() -> list[Timing]:
    """Every model and mix; per site and summed over all layers."""
    device = torch.device("cuda")
    found = []
    with torch.inference_mode():
        for model in MODELS:
            for tokens, adapters in MIXES:
                found += measure(model, tokens, adapters, torch.bfloat16, device, repeats=10)
                torch.cuda.empty_cache()
    return found


def main() -> int:
    """Returns 0 when all tests passed, 1 when one did not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the JSON")
    parser.add_argument("--no-tests", action="store_true", help="timings alone")
    parser.add_argument("--test-limit", type=float, default=300.0, metavar="S", help="seconds for the tests")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: `make bench-gpu` needs one", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    tests: dict[str, object] | None = None if arguments.no_tests else run_tests(arguments.test_limit)
    if tests is not None:
        print(f"{card}: {tests['summary']}")
    timings = run_timings()
    columns = ("model", "tokens", "adapters", "site", "LoRA us", "dense bf16 us", "ratio")
    rows = [
        (
            row.model,
            row.tokens,
            row.adapters,
            row.site,
            f"{row.lora_us:.1f}",
            f"{row.base_us:.1f}",
            f"{row.lora_us / row.base_us:.0%}",
        )
        for row in timings
    ]
    print(table(columns, rows))
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    path = arguments.output / f"gpu-{name}.json"
    write_json(
        path,
        {"environment": environment(), "tests": tests, "lora": [asdict(row) for row in timings]},
    )
    print(f"written to {path}")
    return 0 if tests is None or tests["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
