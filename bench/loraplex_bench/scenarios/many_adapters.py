"""`loraplex bench many-adapters`: thousands of adapters on one server, with room on the device for a few.

They are derived from the demo's: each has bytes, hash and rank of its own and does what one of the demo's
does, so every answer can be checked. A second server, with as many adapters as slots, shows what the same
requests take where nothing is ever swapped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import random
import re
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from loraplex import AsyncClient, LoraplexError
from loraplex_bench.load.environment import environment
from loraplex_bench.load.generator import LoadResult, LoadRun, Outcome
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, demo_flags
from loraplex_bench.load.options import add_count, add_output, add_quantization, settings_of
from loraplex_bench.load.progress import live
from loraplex_bench.load.report import raw_outcome, summarize
from loraplex_bench.load.results import Distribution, milliseconds, table, write_result
from loraplex_bench.load.workload import PlannedRequest, WorkloadConfig, make_workload, sure_prompts
from loraplex_bench.scenarios.checks import Check, MemorySample, memory_check
from loraplex_bench.scenarios.derived_adapters import Derivation, derive_all, spread

DESCRIPTION = """\
Registers thousands of adapters of mixed ranks on the demo model, asks each of them once, and then sends
traffic by Zipf's law, with room on the device for a few: are all answers right, does memory stay flat, how
many requests find their adapter on the device, what do those pay for the swaps of the others, and what does a
miss cost? The adapters' files take about 350 KB each, and are kept for the next run with --work.
"""

EXAMPLES = """\
examples:
  loraplex bench many-adapters
      5,000 adapters, 32 slots; a few minutes, and 1.7 GB of temporary files
  loraplex bench many-adapters --adapters 300 --slots 8 --requests 600 --turns 2
      a small one

the exit code is 1 if a request failed, an answer was wrong, memory grew, or hits were too slow.
"""

_REGISTERED = re.compile(r"registered \d+ adapters from .* in ([0-9.]+) s")

GOAL_HITS = 0.85
"""Least throughput of hits, as a share of that of the server whose adapters all have a slot."""


@dataclasses.dataclass(frozen=True)
class ManyConfig:
    """Settings of a run.

    Attributes:
        slots: most adapters on the device at once; the other server has so many adapters.
        requests: of the Zipf traffic, over all turns.
        turns: measured turns of each server.
        concurrency: callers, each with one request at a time.
        zipf: exponent of the adapters' popularity.
        host_bytes: room for adapters in the server's memory, less than all of them need.
        once: whether each adapter is asked once before.
    """

    adapters: int = 5000
    slots: int = 32
    requests: int = 4000
    turns: int = 4
    concurrency: int = 16
    zipf: float = 1.0
    host_bytes: int = 256 << 20
    quantization: str = "nf4"
    once: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.slots < self.adapters:
            raise ValueError(f"--slots: {self.slots} is not below the {self.adapters} adapters")
        if self.turns < 1 or self.requests < self.turns:
            raise ValueError(f"--requests: {self.requests} are not enough for {self.turns} turns")


@dataclasses.dataclass(frozen=True)
class Misses:
    """Misses of adapters of about one size: bytes moved, and the server's account of the wait for them."""

    count: int
    bytes: float
    wait_s: Distribution


@dataclasses.dataclass(frozen=True)
class ManyResult:
    """The findings.

    Attributes:
        register_s: seconds a registration, by the server's log.
        hit_rate, lru_hit_rate: of the Zipf traffic; the second is worked out for the same requests, one after
            the other, with slots that evict the least recently used.
        throughput, hit_throughput, reference_throughput: requests a second of all callers together, had all
            requests taken as long as: all, the hits, those of the server whose adapters all have a slot.
    """

    config: ManyConfig
    register_s: float
    hit_rate: float
    lru_hit_rate: float
    throughput: float
    hit_throughput: float
    reference_throughput: float
    ttft_s: dict[str, Distribution]
    misses: tuple[Misses, ...]
    seconds_a_mib: float
    once_rate: float
    checks: tuple[Check, ...]
    memory: tuple[MemorySample, ...]
    outcomes: tuple[Outcome, ...] = dataclasses.field(repr=False)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench many-adapters`."""
    default = ManyConfig()
    for flag, value, help_text in (
        ("--adapters", default.adapters, "registered adapters"),
        ("--slots", default.slots, "adapters on the device"),
        ("--requests", default.requests, "requests of the Zipf traffic"),
        ("--turns", default.turns, "measured turns of each server"),
        ("--concurrency", default.concurrency, "callers"),
    ):
        add_count(parser, flag, value, help_text)
    parser.add_argument(
        "--zipf", type=float, default=default.zipf, metavar="S", help="exponent (default: %(default)g)"
    )
    add_quantization(parser, default.quantization)
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep the derived adapters there (default: a temporary folder)",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; answers with the exit code."""
    try:
        config = settings_of(ManyConfig, args)
        result = many_adapters(config, args.work)
    except (LaunchError, LoraplexError, OSError, ValueError) as error:
        print(f"loraplex bench many-adapters: {error}", file=sys.stderr)
        return 2
    text = render(result)
    print(text)
    if args.output is not None:
        document = {
            "kind": "many-adapters",
            "environment": environment(),
            "passed": result.passed,
            **{
                field.name: getattr(result, field.name)
                for field in dataclasses.fields(result)
                if field.name != "outcomes"
            },
            "requests": [raw_outcome(outcome, brief=True) for outcome in result.outcomes],
        }
        print(f"\nwritten: {write_result(args.output, 'many-adapters', text, document)}.json and .txt")
    return 0 if result.passed else 1


def many_adapters(config: ManyConfig, work: Path | None = None) -> ManyResult:
    """Derives the adapters, starts both servers, measures, stops them.

    Raises:
        LaunchError: a server did not start, or did not stop.
    """
    derivations = spread(config.adapters, seed=config.seed)
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-many-")))
        folders = [derive_all(derivations[: config.slots], work), derive_all(derivations, work)]
        servers = [
            stack.enter_context(
                LaunchedServer(
                    [
                        *demo_flags(quantization=config.quantization, adapters=folder),
                        *("--max-adapters-on-device", str(config.slots)),
                        *("--adapter-host-bytes", str(config.host_bytes)),
                        *("--prefix-cache", "off"),
                    ],
                    timeout_s=600.0,
                )
            )
            for folder in folders
        ]
        return asyncio.run(_Run(config, derivations, servers).run())


def render(result: ManyResult) -> str:
    """The tables and the verdict."""
    config = result.config
    rows = [
        [label, found.count, *(milliseconds(value) for value in (found.p50, found.p90, found.p99))]
        for label, found in result.ttft_s.items()
    ]
    sizes = [
        [
            f"{group.bytes / 2**20:.2f} MiB",
            group.count,
            *(milliseconds(value) for value in (group.wait_s.p50, group.wait_s.p90)),
        ]
        for group in result.misses
    ]
    rates = [
        [f"{config.slots} adapters in {config.slots} slots", f"{result.reference_throughput:.1f}", ""],
        *(
            [
                f"{config.adapters} in {config.slots}: {label}",
                f"{rate:.1f}",
                f"{rate / result.reference_throughput:.0%}",
            ]
            for label, rate in (("hits", result.hit_throughput), ("all", result.throughput))
        ),
    ]
    return "\n".join(
        [
            f"{config.adapters} adapters registered in {1000 * result.register_s:.2f} ms each; "
            f"each asked once at {result.once_rate:.1f} requests/s; "
            f"then {config.requests} requests by Zipf's law (exponent {config.zipf:g}) from "
            f"{config.concurrency} callers, in {config.turns} turns beside the other server's",
            "",
            table(["requests/s", "", "of that"], rates),
            "",
            table(["TTFT in milliseconds", "requests", "p50", "p90", "p99"], rows),
            "",
            f"hits: {result.hit_rate:.1%} of the requests; plain LRU, had they come one after the other: "
            f"{result.lru_hit_rate:.1%}",
            "",
            table(["a miss that moves", "misses", "wait in ms, p50", "p90"], sizes),
            f"{1000 * result.seconds_a_mib:.1f} ms for each MiB more",
            "",
            table(
                ["check", "", "found"],
                [[c.name, "ok" if c.passed else "FAILED", c.detail] for c in result.checks],
            ),
        ]
    )


class _Run:
    """One measurement of two servers that are up: without swaps, and with them."""

    def __init__(
        self, config: ManyConfig, derivations: Sequence[Derivation], servers: Sequence[LaunchedServer]
    ) -> None:
        self._config = config
        self._names = [derivation.name for derivation in derivations]
        self._servers = servers
        self._memory: list[MemorySample] = []
        self._phase = "starts"
        logged = _REGISTERED.findall(servers[1].log_tail(1 << 20))
        self._registered_s = sum(float(seconds) for seconds in logged)

    async def run(self) -> ManyResult:
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(AsyncClient(server.grpc, retry=None))
                for server in self._servers
            ]
            await stack.enter_async_context(live(lambda: self._phase, interval_s=10.0))
            warm = self._workload(min(200, config.requests), 1, self._names[: config.slots])
            for client in clients:
                await client.wait_until_ready(60.0)
                await self._load(client, warm)
            sampler = asyncio.create_task(self._sample())
            once = await self._load(clients[1], self._each_once()) if config.once else None
            reference: list[Outcome] = []
            zipf: list[Outcome] = []
            for turn in range(config.turns):
                count = config.requests // config.turns
                self._phase = f"turn {turn + 1} of {config.turns}"
                few = self._workload(count, 1000 + turn, self._names[: config.slots])
                many = self._workload(count, 1000 + turn, self._names)
                # Whoever goes first in one turn goes second in the next.
                for side in (0, 1) if turn % 2 == 0 else (1, 0):
                    found = await self._load(clients[side], (few, many)[side])
                    (reference, zipf)[side].extend(found.outcomes)
            sampler.cancel()
            sizes = {adapter.name: adapter.bytes for adapter in await clients[1].adapters.list()}
        return self._result(once, reference, zipf, sizes)

    async def _load(self, client: AsyncClient, requests: Sequence[PlannedRequest]) -> LoadResult:
        return await LoadRun(client, requests, max_concurrency=self._config.concurrency, timeout_s=300).run()

    def _workload(self, count: int, seed: int, names: Sequence[str]) -> list[PlannedRequest]:
        config = WorkloadConfig(
            count, seed=self._config.seed + seed, adapters=tuple(names), zipf=self._config.zipf
        )
        return make_workload(config, sure_prompts())

    def _each_once(self) -> list[PlannedRequest]:
        self._phase = "asks each adapter once"
        names = list(self._names)
        random.Random(self._config.seed).shuffle(names)
        config = WorkloadConfig(
            len(names), seed=self._config.seed + 2, adapters=tuple(names), adapter_choice="round-robin"
        )
        return make_workload(config, sure_prompts())

    async def _sample(self) -> None:
        started = time.monotonic()
        while True:
            memory = await asyncio.to_thread(self._servers[1].memory_bytes)
            if memory:
                at_s = time.monotonic() - started
                self._memory.append(MemorySample(at_s, memory["rss"], memory["anonymous"]))
            await asyncio.sleep(1.0)

    def _result(
        self,
        once: LoadResult | None,
        reference: Sequence[Outcome],
        zipf: Sequence[Outcome],
        sizes: dict[str, int],
    ) -> ManyResult:
        config = self._config
        hits = [outcome for outcome in zipf if not outcome.adapter_wait_s]
        misses = [outcome for outcome in zipf if outcome.adapter_wait_s]
        everything = [*(once.outcomes if once else ()), *reference, *zipf]
        hit_rate, asked = len(hits) / len(zipf), [outcome.request.label for outcome in zipf]
        rates = [
            config.concurrency / statistics.fmean(outcome.e2e_s for outcome in outcomes) if outcomes else 0.0
            for outcomes in (zipf, hits, reference)
        ]
        moved = [(sizes[outcome.request.label], outcome.adapter_wait_s) for outcome in misses]
        checks = (
            _answers(everything),
            memory_check(self._memory, self._memory[-1].at_s if self._memory else 0.0),
            Check(
                "throughput of hits",
                rates[1] >= GOAL_HITS * rates[2],
                f"{rates[1] / rates[2]:.0%} of that without swaps (at least {GOAL_HITS:.0%})",
            ),
        )
        return ManyResult(
            config=config,
            register_s=self._registered_s / config.adapters,
            hit_rate=hit_rate,
            lru_hit_rate=_lru_hits(asked, config.slots) / len(asked),
            throughput=rates[0],
            hit_throughput=rates[1],
            reference_throughput=rates[2],
            ttft_s={
                label: found
                for label, outcomes in (("without swaps", reference), ("hits", hits), ("misses", misses))
                if (found := Distribution.of(o.ttft_s for o in outcomes if o.ttft_s is not None))
            },
            misses=tuple(_by_size(moved)),
            seconds_a_mib=_slope(moved) * 2**20,
            once_rate=len(once.outcomes) / once.duration_s if once else math.nan,
            checks=checks,
            memory=tuple(self._memory),
            outcomes=tuple(zipf),
        )


def _answers(outcomes: Sequence[Outcome]) -> Check:
    summary = summarize(LoadResult(tuple(outcomes), (), 1.0))
    asked = len({outcome.request.label for outcome in outcomes})
    return Check(
        "answers",
        summary.right == len(outcomes),
        f"{summary.right} of {len(outcomes)} right, from {asked} adapters; {summary.wrong} wrong, "
        f"{summary.leaks} leaked, {summary.failed} failed",
    )


def _lru_hits(asked: Iterable[str], slots: int) -> int:
    there: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for name in asked:
        hits += name in there
        there[name] = None
        there.move_to_end(name)
        if len(there) > slots:
            there.popitem(last=False)
    return hits


def _by_size(moved: Sequence[tuple[int, float]], groups: int = 4) -> Iterable[Misses]:
    """(bytes, wait) in groups of equal count, by bytes."""
    ordered = sorted(moved)
    for index in range(groups):
        group = ordered[index * len(ordered) // groups : (index + 1) * len(ordered) // groups]
        waits = Distribution.of(wait for _, wait in group)
        if waits is not None:
            yield Misses(len(group), statistics.fmean(size for size, _ in group), waits)


def _slope(moved: Sequence[tuple[int, float]]) -> float:
    """Seconds a byte."""
    if len({size for size, _ in moved}) < 2:
        return 0.0
    return statistics.linear_regression([size for size, _ in moved], [wait for _, wait in moved]).slope
