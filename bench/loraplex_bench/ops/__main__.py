"""Times ops beside their peers, on a CPU or a GPU.

    python -m loraplex_bench.ops                                  all that there are for this device
    python -m loraplex_bench.ops attention --only "64 decodes"
    python -m loraplex_bench.ops --dry-run                        everything once, tiny, on a CPU

For each case, all that can run are compared with the reference and then timed: microseconds of one call,
median and least, the share of the roofline, and in brackets how many times as fast this project's is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from loraplex_bench.ops.catalogue import OPS
from loraplex_bench.ops.registry import Row, Setting, dry_run, rows
from loraplex_bench.ops.report import Printer, as_json, summary
from loraplex_bench.ops.timers import REPEATS, measure_ceilings

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """All options."""
    found = argparse.ArgumentParser(
        prog="python -m loraplex_bench.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Not `choices`: with no name given argparse would look for the empty list among them.
    found.add_argument("op", nargs="*", help=f"default: all of {', '.join(OPS)} that the device has")
    found.add_argument("--device", help="default: cuda where torch finds it, else cpu")
    found.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 on a CPU")
    found.add_argument("--cache-dtype", choices=(*DTYPES, "float8_e4m3fn"), help="default: that of --dtype")
    found.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default: 1)")
    found.add_argument(
        "--repeats", type=int, default=REPEATS, metavar="N", help="timed passes (default: %(default)s)"
    )
    found.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of one thread, for a machine that others use too (default: wall)",
    )
    found.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    found.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="S",
        help="seconds for each op, after which no case is begun (default: none)",
    )
    found.add_argument(
        "--json", metavar="FILE", help="write a line of JSON for each case; -: print only those"
    )
    found.add_argument("--dry-run", action="store_true", help="tiny cases, once each, on a CPU")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for an op that is not there."""
    options = parser().parse_args(argv)
    if unknown := set(options.op) - OPS.keys():
        print(f"no op {', '.join(sorted(unknown))}; there are {', '.join(OPS)}", file=sys.stderr)
        return 2
    if options.clock == "cpu" and options.threads != 1:
        print("--clock cpu needs --threads 1", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    found: list[Row] = []
    show = Printer()
    chosen = [OPS[name] for name in options.op or OPS]
    file = Path(options.json) if options.json not in (None, "-") else None
    if file is not None:
        file.write_text("")

    def tell(row: Row) -> None:
        found.append(row)
        text = json.dumps(as_json(row))
        if file is not None:
            with file.open("a") as sink:
                print(text, file=sink)
        if options.json == "-":
            print(text, flush=True)
        else:
            show(row, OPS[row.op].best)

    with torch.inference_mode():
        if options.dry_run:
            for row in dry_run(chosen):
                tell(row)
            return 0
        setting = _setting(options)
        ceilings = measure_ceilings(setting.device)
        for op in chosen:
            cases = op.cases.get(setting.device.type, list)()
            wanted = [case for case in cases if options.only in str(case)]
            for row in rows(op, wanted, setting, ceilings, options.time_limit):
                tell(row)
    if options.json != "-":
        print(*(f"{label}: {value:.2f}" for label, value in summary(found).items()), sep="\n")
    return 0


def _setting(options: argparse.Namespace) -> Setting:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    setting = Setting.of(device, repeats=options.repeats)
    if options.clock == "cpu":
        setting = dataclasses.replace(setting, clock=time.thread_time)
    for name in ("dtype", "cache_dtype"):
        if (chosen := getattr(options, name)) is not None:
            setting = dataclasses.replace(setting, **{name: getattr(torch, chosen)})
    return setting


if __name__ == "__main__":
    raise SystemExit(main())
