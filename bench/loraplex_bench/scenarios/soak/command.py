"""`loraplex bench soak`: minutes of hard use of a real server, then a look for anything wrong or left behind.

While it runs, clients ask twelve adapters through three device slots, break off, run out of time, are killed
in mid-stream; adapters are loaded, pinned and unloaded beside them, and one is replaced in place by another
again and again. Every answer is checked, the broken-off ones as far as they came. Afterwards the server must
be as it was: no block, slot or reference held, memory flat, weights unchanged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from loraplex import AsyncClient, LoraplexError
from loraplex_bench.demo.tasks import TASKS, data_dir
from loraplex_bench.load.answers import AnswerBook
from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, demo_flags
from loraplex_bench.load.options import add_quantization, settings_of
from loraplex_bench.load.progress import live
from loraplex_bench.load.results import table, write_json
from loraplex_bench.scenarios.checks import Check, MemorySample, memory_check, mib
from loraplex_bench.scenarios.soak.afterwards import coverage_check, look
from loraplex_bench.scenarios.soak.callers import caller, crasher
from loraplex_bench.scenarios.soak.changes import adapter_keeper, pinner, publish_first, replacer
from loraplex_bench.scenarios.soak.screening import screen, warm_up
from loraplex_bench.scenarios.soak.state import Soak, SoakConfig

DESCRIPTION = """\
Uses a real server hard for minutes on the demo model: more adapters than slots, cancellations, deadlines,
clients killed in mid-stream, adapters loaded, replaced, pinned and unloaded meanwhile. Checks every answer,
and afterwards that nothing is left behind: KV blocks, adapter references, memory, changed weights. The exit
code is 0 only if all of it holds.
"""

EXAMPLES = """\
examples:
  loraplex bench soak
      five minutes, 12 adapters through 3 slots
  loraplex bench soak --duration 3600 --concurrency 64 --quantization int4 --json soak.json
      an hour on int4, raw numbers in soak.json
"""


@dataclasses.dataclass(frozen=True)
class SoakResult:
    """Events of the soak, counted by kind, and what was found afterwards."""

    config: SoakConfig
    events: dict[str, int]
    checks: tuple[Check, ...]
    faults: tuple[str, ...]
    memory: tuple[MemorySample, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench soak`."""
    default = SoakConfig()
    parser.add_argument(
        "--duration",
        type=float,
        default=default.duration_s,
        metavar="S",
        help="seconds (default: %(default)g)",
    )
    parser.add_argument(
        "--adapters", type=int, default=default.adapters, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=default.slots,
        metavar="N",
        help="adapters on the device (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=default.concurrency,
        metavar="N",
        help="callers (default: %(default)s)",
    )
    parser.add_argument("--zipf", type=float, default=default.zipf, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--crash-interval",
        type=float,
        default=default.crash_interval_s,
        metavar="S",
        help="mean seconds between killed clients (default: %(default)g)",
    )
    add_quantization(parser, default.quantization)
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write counts, checks and memory there")


def run(args: argparse.Namespace) -> int:
    """Soaks, prints, writes; answers with the exit code."""
    config = settings_of(SoakConfig, args, duration_s=args.duration, crash_interval_s=args.crash_interval)
    try:
        result = soak(config)
    except (LaunchError, LoraplexError, OSError, LookupError, ValueError) as error:
        print(f"loraplex bench soak: {error}", file=sys.stderr)
        return 2
    print(render(result))
    if args.json is not None:
        document = {"kind": "soak", "environment": environment(), "passed": result.passed, "result": result}
        write_json(args.json, document)
        print(f"\nraw numbers: {args.json}")
    return 0 if result.passed else 1


def soak(config: SoakConfig) -> SoakResult:
    """Starts a server, soaks it, stops it.

    Raises:
        LaunchError: the server did not start.
        ValueError: the demo has not that many adapters, or there are no more adapters than slots.
    """
    with _folders(config) as (served, spare):
        flags = [
            *demo_flags(quantization=config.quantization, adapters=served),
            *("--adapter-root", str(spare)),
            *("--max-adapters-on-device", str(config.slots)),
        ]
        with LaunchedServer(flags) as server:
            result = asyncio.run(_soak(config, server, served, spare))
            code = server.stop()
    stopped = Check("clean stop", code == 0, f"exit code {code} after SIGTERM, no process left")
    return dataclasses.replace(result, checks=(*result.checks, stopped))


def render(result: SoakResult) -> str:
    """The printed tables of events and checks, and the verdict."""
    blocks = [
        table(["event", "count"], sorted(result.events.items())),
        table(
            ["check", "", "found"],
            [[c.name, "ok" if c.passed else "FAILED", c.detail] for c in result.checks],
        ),
    ]
    if result.faults:
        blocks.append("\n".join(["faults:", *(f"  {fault}" for fault in result.faults[:20])]))
    blocks.append("soak passed" if result.passed else "soak FAILED")
    return "\n\n".join(blocks)


async def _soak(config: SoakConfig, server: LaunchedServer, served: Path, spare: Path) -> SoakResult:
    """Soaks a server that is up."""
    async with AsyncClient(server.grpc, retry=None) as client:
        names = sorted(path.name for path in served.iterdir())
        soak = Soak(config, server, client, names, sorted(spare.iterdir()))
        model = await client.model()
        screening = await screen(soak)
        await publish_first(soak)
        await warm_up(soak, model)
        soak.book = AnswerBook(line for lines in soak.lines.values() for line in lines)
        started = time.monotonic()
        soak.deadline_s = started + config.duration_s
        actors = [
            *(caller(soak, number) for number in range(config.concurrency)),
            crasher(soak),
            adapter_keeper(soak),
            pinner(soak),
            replacer(soak),
            _sampler(soak, started),
        ]
        async with live(lambda: _describe(soak, started), interval_s=10.0):
            await _all(actors)
        checks = (screening, *await look(soak, model), memory_check(soak.memory, config.duration_s))
        covered = coverage_check(soak, await client.adapters.list())
    return SoakResult(config, dict(soak.events), (*checks, covered), tuple(soak.faults), tuple(soak.memory))


async def _sampler(soak: Soak, started: float) -> None:
    while soak.running():
        memory = await asyncio.to_thread(soak.server.memory_bytes)
        if memory:
            soak.memory.append(MemorySample(time.monotonic() - started, memory["rss"], memory["anonymous"]))
        if not soak.server.running:
            raise LaunchError(f"the server ended during the soak\n{soak.server.log_tail()}")
        await soak.pause(min(1.0, soak.config.duration_s / 60))


def _describe(soak: Soak, started: float) -> str:
    answered = sum(count for key, count in soak.events.items() if key.endswith(", answered"))
    memory = mib(soak.memory[-1].anonymous) if soak.memory else "?"
    return (
        f"{time.monotonic() - started:.0f}/{soak.config.duration_s:.0f} s | {answered} answered | "
        f"{soak.events['clients killed in mid-stream']} clients killed | {len(soak.faults)} faults"
        f" | {memory}"
    )


@contextlib.contextmanager
def _folders(config: SoakConfig) -> Iterator[tuple[Path, Path]]:
    """The demo's adapters, copied: a folder that is served, and one to load from at run time."""
    source = data_dir() / "adapters"
    names = [name for name in TASKS if (source / name / "adapter_config.json").is_file()]
    if not config.slots < config.adapters <= len(names):
        raise ValueError(
            f"adapters: {config.adapters} is not more than the {config.slots} slots, "
            f"or more than the demo's {len(names)}"
        )
    with tempfile.TemporaryDirectory(prefix="loraplex-soak-") as folder:
        served, spare = Path(folder, "served"), Path(folder, "spare")
        for name in names[: config.adapters]:
            shutil.copytree(source / name, served / name)
        for name in names[config.adapters :] or names[:2]:
            shutil.copytree(source / name, spare / name)
        yield served, spare


async def _all(actors: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs all to their end; the first that fails ends the others, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for actor in actors:
                group.create_task(actor)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
