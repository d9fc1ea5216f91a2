"""`loraplex bench swap-latency`: time to first token with twice as many adapters as slots.

Two servers, side by side and measured in turns, so that whatever else the machine does falls on both: one
whose adapters all have a slot, one with twice the adapters. Both get the same requests at the same moments,
but for the adapters' names, at a share of the measured capacity of the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loraplex import AsyncClient, LoraplexError
from loraplex_bench.demo.tasks import TASKS
from loraplex_bench.load.environment import environment
from loraplex_bench.load.generator import LoadResult, LoadRun, Outcome
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, demo_flags
from loraplex_bench.load.options import add_output, add_quantization, settings_of
from loraplex_bench.load.report import Summary, raw_outcome, summarize
from loraplex_bench.load.results import Distribution, milliseconds, table, write_result
from loraplex_bench.load.workload import PlannedRequest, WorkloadConfig, make_workload, sure_prompts
from loraplex_bench.scenarios.derived_adapters import Derivation, demo_rank, derive_all

DESCRIPTION = """\
Serves N adapters in N slots, and 2 N adapters in N slots, on the demo model, with the same requests at a
share of the measured capacity of the first: what do users of the second server wait for their first token,
those whose adapter is on the device, and those for whom it must be brought in? Every answer is checked.
"""

EXAMPLES = """\
examples:
  loraplex bench swap-latency
      8 and 16 adapters in 8 slots at 60% of capacity, ten turns each
  loraplex bench swap-latency --slots 4 --load 0.8 --turns 3
      4 and 8 adapters in 4 slots at 80%, quicker

the exit code is 1 if a request failed, an answer was wrong, or a goal was missed.
"""

GOAL_P50 = 2.0
"""Most by which the median time to first token may grow."""

GOAL_RESIDENT = 1.2
"""The same for requests whose adapter was on the device."""


@dataclasses.dataclass(frozen=True)
class SwapConfig:
    """Settings of a run.

    Attributes:
        load: arrivals, as a share of the requests a second that the server with a slot for each adapter
            completes when it always has enough of them.
        turns: measured turns of each server.
        turn_s: seconds that a turn's arrivals take.
        capacity_requests: how many are sent at once to measure the capacity.
        launch_flags: of `loraplex serve`, for both servers.
    """

    slots: int = 8
    load: float = 0.6
    turns: int = 10
    turn_s: float = 6.0
    capacity_requests: int = 600
    concurrency: int = 64
    quantization: str = "nf4"
    launch_flags: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= len(TASKS):
            raise ValueError(f"--slots: {self.slots} is not within 1 and {len(TASKS)}")
        if not 0 < self.load < math.inf:
            raise ValueError(f"--load: {self.load} is no share of the capacity")


@dataclasses.dataclass(frozen=True)
class Side:
    """One server's measured turns, put together."""

    adapters: int
    summary: Summary
    resident_ttft_s: Distribution | None
    swapped_ttft_s: Distribution | None
    turn_p50_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class SwapResult:
    """`capacity`: requests a second, of the server with a slot for each adapter."""

    config: SwapConfig
    capacity: float
    one_each: Side
    two_each: Side
    outcomes: tuple[tuple[Outcome, ...], tuple[Outcome, ...]] = dataclasses.field(repr=False)

    @property
    def growth(self) -> float:
        """Median time to first token, of 2 N adapters over that of N."""
        return _p50(self.two_each.summary.ttft_s) / _p50(self.one_each.summary.ttft_s)

    @property
    def resident_growth(self) -> float:
        """The same for requests whose adapter was on the device, on both servers."""
        return _p50(self.two_each.resident_ttft_s) / _p50(self.one_each.resident_ttft_s)

    @property
    def passed(self) -> bool:
        summaries = (self.one_each.summary, self.two_each.summary)
        right = not any(summary.failed or summary.wrong or summary.leaks for summary in summaries)
        return right and self.growth <= GOAL_P50 and self.resident_growth <= GOAL_RESIDENT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench swap-latency`."""
    default = SwapConfig()
    parser.add_argument(
        "--slots", type=int, default=default.slots, metavar="N", help="adapters on the device (default: 8)"
    )
    parser.add_argument(
        "--load", type=float, default=default.load, metavar="F", help="share of the capacity (default: 0.6)"
    )
    parser.add_argument(
        "--turns", type=int, default=default.turns, metavar="N", help="of each server (default: %(default)s)"
    )
    parser.add_argument(
        "--turn-seconds",
        type=float,
        default=default.turn_s,
        metavar="S",
        help="length of a turn (default: %(default)g)",
    )
    add_quantization(parser, default.quantization)
    parser.add_argument(
        "--launch-flags",
        default="",
        metavar="FLAGS",
        help="of `loraplex serve`, in one string, for both servers",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; answers with the exit code."""
    try:
        flags = tuple(shlex.split(args.launch_flags))
        config = settings_of(SwapConfig, args, turn_s=args.turn_seconds, launch_flags=flags)
        result = swap_latency(config)
    except (LaunchError, LoraplexError, OSError, ValueError) as error:
        print(f"loraplex bench swap-latency: {error}", file=sys.stderr)
        return 2
    text = render(result)
    print(text)
    if args.output is not None:
        document = {
            "kind": "swap-latency",
            "environment": environment(),
            "passed": result.passed,
            "config": result.config,
            "capacity": result.capacity,
            "growth": result.growth,
            "resident_growth": result.resident_growth,
            "sides": [result.one_each, result.two_each],
            "requests": [[raw_outcome(one, brief=True) for one in side] for side in result.outcomes],
        }
        print(f"\nwritten: {write_result(args.output, 'swap-latency', text, document)}.json and .txt")
    return 0 if result.passed else 1


def swap_latency(config: SwapConfig) -> SwapResult:
    """Starts both servers, measures, stops them.

    Raises:
        LaunchError: a server did not start, or did not stop.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-swap-") as work, contextlib.ExitStack() as stack:
        servers = []
        for copies in (1, 2):
            adapters = derive_all(_derivations(config.slots, copies), Path(work, str(copies)))
            flags = [
                *demo_flags(quantization=config.quantization, adapters=adapters),
                *("--max-adapters-on-device", str(config.slots)),
                # A prompt comes again now and then, and must not be cheaper for one of the servers.
                *("--prefix-cache", "off"),
                *config.launch_flags,
            ]
            servers.append(stack.enter_context(LaunchedServer(flags)))
        return asyncio.run(_measure(config, servers))


def render(result: SwapResult) -> str:
    """The table and the verdict."""
    config = result.config
    sides = (result.one_each, result.two_each)
    rows = []
    for side in sides:
        for label, found in (
            ("all", side.summary.ttft_s),
            ("adapter on the device", side.resident_ttft_s),
            ("adapter brought in", side.swapped_ttft_s),
        ):
            if found is not None:
                shown = (milliseconds(value) for value in (found.p50, found.p90, found.p99, found.max))
                rows.append([f"{side.adapters} in {config.slots}: {label}", found.count, *shown])
    checked = sum(side.summary.right + side.summary.wrong + side.summary.leaks for side in sides)
    right = sum(side.summary.right for side in sides)
    failed = sum(side.summary.failed for side in sides)
    return "\n".join(
        [
            f"capacity {result.capacity:.1f} requests/s with {config.slots} adapters in as many slots; "
            f"arrivals at {config.load:.0%} of it, {config.turns} turns of {config.turn_s:g} s each",
            "",
            table(["TTFT in milliseconds", "requests", "p50", "p90", "p99", "max"], rows),
            "",
            f"answers: {right} of {checked} right, {failed} requests failed",
            f"median TTFT x {result.growth:.2f} (goal: at most {GOAL_P50:g}); where the adapter was on the "
            f"device x {result.resident_growth:.2f} (goal: at most {GOAL_RESIDENT:g})",
            "goals met" if result.passed else "goals MISSED",
        ]
    )


def _derivations(slots: int, copies: int) -> list[Derivation]:
    """Copies of the demo's first adapters, so that both servers compute the same at the same ranks."""
    return [
        Derivation(f"{task}.{copy}", task, demo_rank(task), seed=copy)
        for copy in range(copies)
        for task in list(TASKS)[:slots]
    ]


async def _measure(config: SwapConfig, servers: Sequence[LaunchedServer]) -> SwapResult:
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(server.grpc, retry=None)) for server in servers
        ]
        names = [[adapter.name for adapter in await client.adapters.list()] for client in clients]
        for client, adapters in zip(clients, names, strict=True):
            count = min(200, config.capacity_requests)
            warm = WorkloadConfig(count, seed=1, adapters=tuple(adapters), adapter_choice="round-robin")
            await LoadRun(client, make_workload(warm, sure_prompts()), max_concurrency=32).run()
        full = WorkloadConfig(
            config.capacity_requests, seed=config.seed, adapters=tuple(names[0]), adapter_choice="uniform"
        )
        load = LoadRun(clients[0], make_workload(full, sure_prompts()), max_concurrency=config.concurrency)
        capacity = summarize(await load.run()).request_throughput
        found: tuple[list[Outcome], list[Outcome]] = ([], [])
        medians: tuple[list[float], list[float]] = ([], [])
        durations = [0.0, 0.0]
        for turn in range(config.turns):
            # Whoever goes first in one turn goes second in the next.
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                requests = _turn(config, capacity, turn, names[side])
                result = await LoadRun(clients[side], requests).run()
                found[side].extend(result.outcomes)
                durations[side] += result.duration_s
                medians[side].append(_p50(summarize(result).ttft_s))
    one, two = (_side(len(names[side]), found[side], durations[side], medians[side]) for side in (0, 1))
    return SwapResult(config, capacity, one, two, (tuple(found[0]), tuple(found[1])))


def _turn(config: SwapConfig, capacity: float, turn: int, adapters: Sequence[str]) -> list[PlannedRequest]:
    rate = config.load * capacity
    workload = WorkloadConfig(
        max(1, round(rate * config.turn_s)),
        seed=config.seed + 1000 + turn,
        rate=rate,
        adapters=tuple(adapters),
        adapter_choice="uniform",
    )
    return make_workload(workload, sure_prompts())


def _side(adapters: int, outcomes: Sequence[Outcome], duration_s: float, medians: Sequence[float]) -> Side:
    done = [outcome for outcome in outcomes if outcome.ttft_s is not None]
    return Side(
        adapters,
        summarize(LoadResult(tuple(outcomes), (), duration_s)),
        Distribution.of(o.ttft_s for o in done if not o.adapter_wait_s and o.ttft_s is not None),
        Distribution.of(o.ttft_s for o in done if o.adapter_wait_s and o.ttft_s is not None),
        tuple(medians),
    )


def _p50(distribution: Distribution | None) -> float:
    return math.nan if distribution is None else distribution.p50
