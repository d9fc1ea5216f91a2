"""`make bench-gpu`: first that the GPU path is right, then how fast its kernels are.

    python -m loraplex_bench.gpu --output bench/results

Seven sections, `--only` picks some:

- tests      the op tests and the parity tests of the engine, on the GPU (they choose it by themselves)
- lora       the LoRA op with cold adapters: whole steps of a Llama-3-8B, its share of a prefill, and tokens x
             mixes x ranks beside the peers that are at hand (`lora_peers`)
- quant      the 4-bit products beside cuBLAS, gemlite and bitsandbytes (`ops_quant_cuda`)
- attention  paged attention beside torch's (`ops_attention`)
- fused      sums and norms, rotations and KV writes, gates, beside transformers' modules (`ops_fused`)
- step       whole decode steps of a random Llama-3-8B, by batch and number of adapters (`step_table`)
- server     the server on that model under load, and transformers + PEFT with the same requests
             (`server_table`)

Timings of kernels are of CUDA graphs. One JSON named after the card holds the environment and every section
that was run, written anew after each row: a run cut short leaves what it has, and a later one adds to it.
Installs nothing: it uses the interpreter and the packages it is run with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraplex_bench.load.environment import environment
from loraplex_bench.load.report import table, write_json
from loraplex_bench.ops import lora_table, ops_attention, ops_fused, ops_quant_cuda
from loraplex_bench.ops.lora_table import Row

SECTIONS = ("tests", "lora", "quant", "attention", "fused", "step", "server")
TINY_SECTIONS = ("step", "server")
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


class _Document:
    """The JSON on disk: sections of this run, and those of earlier ones on the same card."""

    def __init__(self, folder: Path, card: str) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        self.path = folder / f"gpu-{name}.json"
        self._sections: dict[str, Any] = {}
        if self.path.exists():
            self._sections = json.loads(self.path.read_text())

    def write(self, section: str, content: object) -> None:
        self._sections |= {section: {"environment": environment(), "result": content}}
        write_json(self.path, self._sections)


def time_lora(document: _Document, limit_s: float, quick: bool, device: torch.device) -> None:
    """The LoRA section, printed and written row by row."""
    deadline = time.monotonic() + limit_s
    wanted = lora_table.cases(quick)
    rows: list[Row] = []
    ceiling = lora_table.copy_ceiling(device)
    result: dict[str, Any] = {"copy_bytes_per_s": ceiling}
    print(f"a large copy moves {ceiling / 1e12:.2f} TB/s, read and written", flush=True)
    result["whole"] = whole_steps(ceiling, device)
    document.write("lora", result)
    reasons: dict[str, str] = {}
    for row in lora_table.measure_all(wanted, torch.bfloat16, device, deadline):
        rows.append(row)
        print("  ".join(line_of(row, ceiling)), flush=True)
        for peer, reason in row.not_run.items():
            if reasons.get(peer) != reason:
                reasons[peer] = reason
                print(f"  not run: {peer}: {reason}", flush=True)
        result["rows"] = [lora_table.as_json(each, ceiling) for each in rows]
        result["summary"] = lora_table.summary(rows, ceiling)
        document.write("lora", result)
    columns = ("model", "tokens", "mix", "ranks", "us a layer", "GB/s", "roofline", "faster than")
    print(table(columns, [line_of(row, ceiling) for row in rows]))
    for label, value in result.get("summary", {}).items():
        print(f"{label}: {value:.2f}")
    if len(rows) < len(wanted):
        print(f"{len(rows)} of {len(wanted)} rows within the time limit")


def time_quant(document: _Document, limit_s: float) -> None:
    """The section of the 4-bit products."""
    timings = []
    for timing in ops_quant_cuda.measure_cuda(limit_s):
        timings.append(asdict(timing))
        print(ops_quant_cuda.row(timing), flush=True)
        document.write("quant", timings)


def time_attention(document: _Document, limit_s: float, device: torch.device) -> None:
    """The section of attention, bf16."""
    deadline = time.monotonic() + limit_s
    ceilings = ops_attention.measure_ceilings(device)
    timings = []
    for workload in ops_attention.gpu_workloads():
        if time.monotonic() > deadline:
            print(f"{workload.name}: {limit_s:.0f} s are over")
            break
        timing = ops_attention.measure_on_gpu(workload, torch.bfloat16, device, ceilings)
        torch.cuda.empty_cache()
        timings.append(asdict(timing))
        print(
            f"{timing.workload:46} {timing.attend:9.1f} us, "
            f"{timing.floor / timing.attend:.0%} of the roofline, "
            f"{timing.per_sequence / timing.attend:.2f}x SDPA one by one, "
            f"{timing.padded / timing.attend:.2f}x padded",
            flush=True,
        )
        document.write("attention", {"ceilings": asdict(ceilings), "timings": timings})


def time_fused(document: _Document, limit_s: float, device: torch.device) -> None:
    """The section of what runs between projections, bf16."""
    deadline = time.monotonic() + limit_s
    ceilings = ops_attention.measure_ceilings(device)
    timings = []
    for case in ops_fused.cases():
        if time.monotonic() > deadline:
            print(f"{case.op}, {case.shape.name}, {case.tokens} tokens: {limit_s:.0f} s are over")
            break
        timing = ops_fused.measure_on_gpu(case, torch.bfloat16, device, ceilings)
        torch.cuda.empty_cache()
        timings.append(asdict(timing))
        print(timing.line(), flush=True)
        document.write("fused", {"ceilings": asdict(ceilings), "timings": timings})


def time_steps(
    document: _Document,
    limit_s: float,
    device: torch.device,
    *,
    kv_cache_dtype: str = "auto",
    fused: bool = True,
    tiny: bool = False,
) -> None:
    """The section of whole decode steps, printed and written row by row."""
    # Here, not above: the kernels' sections run without the server's packages.
    from loraplex_bench.scenarios import decode_steps as step_table

    wanted = step_table.StepTable.tiny() if tiny else step_table.StepTable()
    wanted = dataclasses.replace(wanted, kv_cache_dtype=kv_cache_dtype, fused=fused)
    section = "step" if kv_cache_dtype == "auto" else f"step-{kv_cache_dtype}"
    section += "" if fused else "-unfused"
    rows: list[step_table.StepRow] = []
    for row in step_table.measure(wanted, device, limit_s):
        rows.append(row)
        print(row.line(), flush=True)
        document.write(section, [each.as_json() for each in rows])
    for goal in step_table.goals(rows):
        print(goal.line())
    expected = [
        (quantization, batch, adapters)
        for quantization in wanted.quantizations
        for batch in wanted.batches
        for adapters in dict.fromkeys(min(count, batch) for count in wanted.adapters)
    ]
    if len(rows) < len(expected):
        print(f"{len(rows)} of {len(expected)} rows within the time limit")


def time_server(document: _Document, limit_s: float, device: torch.device, *, tiny: bool = False) -> None:
    """The section of the server, printed and written row by row."""
    from loraplex import LoraplexError
    from loraplex_bench.load.launcher import LaunchError
    from loraplex_bench.scenarios import gpu_server as server_table

    wanted = server_table.ServerTable.tiny() if tiny else server_table.ServerTable()
    rows: list[server_table.ServerRow] = []

    def say(row: server_table.ServerRow) -> None:
        rows.append(row)
        print(row.line(), flush=True)
        document.write("server", server_table.as_json(rows, wanted))

    try:
        server_table.measure(wanted, device, limit_s, say)
    except (LaunchError, LoraplexError, OSError) as error:
        say(
            server_table.ServerRow("loraplex", wanted.quantization, "all at once", not_run=str(error)[-1500:])
        )
    if (line := server_table.goal_line(rows)) is not None:
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
        help=f"try {' and '.join(TINY_SECTIONS)} out on a tiny model, on a CPU if need be",
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
    document = _Document(arguments.output, card)
    passed = True
    if "tests" in sections:
        tests = run_tests(arguments.test_limit)
        passed = bool(tests["passed"])
        print(f"{card}: {tests['summary']}", flush=True)
        document.write("tests", tests)
    with torch.inference_mode():
        if "lora" in sections:
            time_lora(document, arguments.time_limit, arguments.quick, device)
        if "quant" in sections:
            time_quant(document, arguments.time_limit)
        if "attention" in sections:
            time_attention(document, arguments.time_limit, device)
        if "fused" in sections:
            time_fused(document, arguments.time_limit, device)
    torch.cuda.empty_cache()
    if "step" in sections:
        options = {"kv_cache_dtype": arguments.kv_cache_dtype, "fused": not arguments.unfused}
        time_steps(document, arguments.time_limit, device, **options)
    if "server" in sections:
        time_server(document, arguments.time_limit, device)
    print(f"written to {document.path}")
    return 0 if passed else 1


def _try_out(arguments: argparse.Namespace) -> int:
    """The sections that run anywhere, at their smallest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document = _Document(arguments.output, f"tiny on {device.type}")
    sections = arguments.only or TINY_SECTIONS
    if "step" in sections:
        time_steps(document, arguments.time_limit, device, kv_cache_dtype=arguments.kv_cache_dtype, tiny=True)
    if "server" in sections:
        time_server(document, arguments.time_limit, device, tiny=True)
    print(f"written to {document.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
