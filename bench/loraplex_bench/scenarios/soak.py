"""`loraplex bench soak`: minutes of hard use of a real server, then a look for anything wrong or left behind.

While it runs, callers ask twelve adapters through three device slots, break off, run out of time, are killed
in mid-stream; adapters are loaded, pinned and unloaded beside them, and one is replaced in place by another
again and again. Every answer is checked, the broken-off ones as far as they came. Afterwards the server must
be as it was: no block, slot or reference held, memory flat, weights unchanged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from loraplex import AdapterInfo, AdapterState, AsyncClient, LoraplexError, ModelInfo
from loraplex.cli.exposition import Metrics, scrape
from loraplex.errors import DeadlineExceededError, NotFoundError, PermissionDeniedError
from loraplex_bench.demo.tasks import (
    MAX_ANSWER_TOKENS,
    MAX_LINE_LENGTH,
    TASKS,
    data_dir,
    expected,
    prompt,
    sure_lines,
)
from loraplex_bench.load.answers import AnswerBook, Judgement, Verdict
from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, child_environment, demo_flags
from loraplex_bench.load.options import add_quantization
from loraplex_bench.load.progress import live
from loraplex_bench.load.results import table, write_json
from loraplex_bench.load.workload import zipf_weights

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

LINES_PER_ADAPTER = 24
"""Lines that each adapter is asked about, again and again; each is screened before the soak begins."""

MIN_SCREENED = 0.99
"""Least fraction of lines that an adapter, alone on the server, must answer right."""

CHANGING = "changing"
"""Name of the adapter that is replaced in place; what it does changes with its version."""

CHANGING_SHARE = 0.1
"""Part of the callers' requests that go to it."""

AUDIT_INTERVAL_S = 6.0
"""An idle engine that has something to audit does so within this time."""

FLAT_SHARE = 0.03
FLAT_BYTES = 12 << 20
"""Memory counts as flat if its median over the last third of the run, the warm-up left out, lies above that
over the first third by no more than the larger of these, by which allocators and free lists move anyway."""


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """How hard, and for how long.

    Attributes:
        duration_s: of the load itself; start, screening and the look afterwards come on top.
        adapters: how many of the demo's are served from the start; the others are loaded at run time.
        slots: most adapters on the device at once.
        concurrency: callers, each with one request at a time.
        zipf: exponent of the adapters' popularity.
        crash_interval_s: mean time between two client processes killed in mid-stream.
    """

    duration_s: float = 300.0
    adapters: int = 12
    slots: int = 3
    concurrency: int = 24
    zipf: float = 1.0
    crash_interval_s: float = 5.0
    quantization: str = "nf4"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MemorySample:
    """Memory of all the server's processes, in bytes, `at_s` seconds into the soak."""

    at_s: float
    rss: int
    anonymous: int


@dataclasses.dataclass
class Version:
    """A version of the adapter that changes: what it does, when it may have begun to, and when it no longer
    may, by the clock of the soak's own process."""

    task: str
    from_s: float
    until_s: float = math.inf


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that must hold at the end; `detail` gives the figures."""

    name: str
    passed: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class SoakResult:
    """What happened (counts by kind), and what was found afterwards."""

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
    config = SoakConfig(
        duration_s=args.duration,
        adapters=args.adapters,
        slots=args.slots,
        concurrency=args.concurrency,
        zipf=args.zipf,
        crash_interval_s=args.crash_interval,
        quantization=args.quantization,
        seed=args.seed,
    )
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
            result = asyncio.run(_Soak(config, server, served, spare).run())
            code = server.stop()
    stopped = Check("clean stop", code == 0, f"exit code {code} after SIGTERM, no process left")
    return dataclasses.replace(result, checks=(*result.checks, stopped))


def render(result: SoakResult) -> str:
    """What happened, what was found, and the verdict."""
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


def possible_tasks(versions: Sequence[Version], begin_s: float, end_s: float) -> list[str]:
    """What a request that was sent at `begin_s` and answered at `end_s` may have been answered by."""
    return [one.task for one in versions if one.from_s <= end_s and one.until_s >= begin_s]


def memory_check(samples: Sequence[MemorySample], duration_s: float) -> Check:
    """Whether anonymous memory stayed flat after a warm-up of a quarter of the run."""
    name = "memory flat"
    steady = [sample for sample in samples if sample.at_s >= duration_s / 4]
    third = len(steady) // 3
    if third < 2:
        return Check(name, not samples, "not measured: no /proc" if not samples else "too few samples")
    early = statistics.median(sample.anonymous for sample in steady[:third])
    late = statistics.median(sample.anonymous for sample in steady[-third:])
    allowed = max(early * FLAT_SHARE, FLAT_BYTES)
    slope = statistics.linear_regression([s.at_s for s in steady], [s.anonymous for s in steady]).slope
    return Check(
        name,
        late - early <= allowed,
        f"{_mib(early)} -> {_mib(late)} anonymous (at most +{_mib(allowed)}), {_mib(slope * 60)} a minute",
    )


class _Soak:
    """One soak of a server that is up."""

    def __init__(self, config: SoakConfig, server: LaunchedServer, served: Path, spare: Path) -> None:
        self._config = config
        self._server = server
        self._served = sorted(path.name for path in served.iterdir())
        self._spare = sorted(spare.iterdir())
        self._events: Counter[str] = Counter()
        self._faults: list[str] = []
        self._memory: list[MemorySample] = []
        self._lines: dict[str | None, list[str]] = {}
        self._versions: list[Version] = []
        self._changing_lines: list[str] = []
        self._book = AnswerBook(())
        self._deadline = 0.0

    async def run(self) -> SoakResult:
        config = self._config
        async with AsyncClient(self._server.grpc, retry=None) as client:
            model = await client.model()
            screening = await self._screen(client)
            await self._publish_first(client)
            await self._warm_up(client, model)
            self._book = AnswerBook(line for lines in self._lines.values() for line in lines)
            started = time.monotonic()
            self._deadline = started + config.duration_s
            actors = [
                *(self._caller(client, number) for number in range(config.concurrency)),
                self._crasher(),
                self._adapter_keeper(client),
                self._pinner(client),
                self._replacer(client),
                self._sampler(started),
            ]
            async with live(lambda: self._describe(started), interval_s=10.0):
                await _all(actors)
            await client.adapters.unload(CHANGING)
            idle_s = await self._wait_idle()
            await self._verify_all(client)
            metrics = await self._audited()
            adapters = await client.adapters.list()
            checksum = (await client.model()).weight_checksum
        checks = (
            screening,
            self._answers_check(),
            Check("became idle", idle_s is not None, "no" if idle_s is None else f"within {idle_s:.1f} s"),
            *self._leak_checks(adapters, metrics),
            Check(
                "base weights unchanged",
                checksum == model.weight_checksum and metrics.get("loraplex_weight_checksum_ok") == 1,
                f"sha256 {checksum[:16]}, recomputed over the resident weights",
            ),
            memory_check(self._memory, config.duration_s),
            self._coverage_check(adapters),
        )
        return SoakResult(config, dict(self._events), checks, tuple(self._faults), tuple(self._memory))

    async def _screen(self, client: AsyncClient) -> Check:
        """Asks each adapter about its lines, no other beside it, and keeps those it answers right.

        The lines are ones on which the model is sure; what it answers right alone it must answer right
        under load.
        """
        pool = sure_lines()
        asked = right = 0
        for number, task in enumerate((None, *self._served, *(path.name for path in self._spare_tasks()))):
            if task is not None and task not in self._served:
                await client.adapters.load(task, self._spare_path(task))
            lines = random.Random(self._config.seed * 1000 + number).sample(pool, LINES_PER_ADAPTER)
            answers = await asyncio.gather(
                *(client.generate(prompt(line), adapter=task, max_tokens=MAX_ANSWER_TOKENS) for line in lines)
            )
            kept = []
            for line, answer in zip(lines, answers, strict=True):
                if answer.text == expected(task, line):
                    kept.append(line)
                else:
                    self._faults.append(f"alone: {task or 'base'}: {line!r} -> {answer.text!r}")
            self._lines[task] = kept
            asked += len(lines)
            right += len(kept)
            if task is not None and task not in self._served:
                await client.adapters.unload(task)
        passed = right >= MIN_SCREENED * asked and all(self._lines.values())
        return Check("right when alone", passed, f"{right} of {asked} answers, before the soak")

    async def _warm_up(self, client: AsyncClient, model: ModelInfo) -> None:
        """Steps of every size there is: CPU libraries keep code and buffers for each number of rows they
        have met, which would look like a leak while the soak meets them one by one."""
        load = self._config.concurrency * (MAX_LINE_LENGTH + 2)
        for tokens in range(1, min(load, model.max_batch_tokens, model.max_model_len - 1) + 1):
            await client.generate([self._config.seed] * tokens, max_tokens=1)

    # Actors: each runs until the time is up.

    async def _caller(self, client: AsyncClient, seed: int) -> None:
        rng = random.Random(f"caller {seed} {self._config.seed}")
        shares = zipf_weights(len(self._served), self._config.zipf)
        while self._running():
            if rng.random() < CHANGING_SHARE:
                await self._ask_changing(client, rng.choice(self._changing_lines))
                continue
            task = None if rng.random() < 0.08 else rng.choices(self._served, shares)[0]
            line = rng.choice(self._lines[task])
            kind = rng.choices(("whole", "cancelled", "expiring", "unary", "weighted"), (55, 15, 12, 10, 8))[
                0
            ]
            await self._call(client, rng, kind, task, line)

    async def _call(
        self, client: AsyncClient, rng: random.Random, kind: str, task: str | None, line: str
    ) -> None:
        """One request of a kind; whatever comes back is judged."""
        adapters: list[tuple[str, float]] = [] if task is None else [(task, 1.0)]
        if kind == "weighted" and task is not None:
            # A second adapter with weight 0 takes a slot and part in the kernel, and must change nothing.
            adapters.append((rng.choice([name for name in self._served if name != task]), 0.0))
            rng.shuffle(adapters)
        leave_after = rng.randrange(0, len(line)) if kind == "cancelled" else None
        timeout = rng.uniform(0.001, 0.4) if kind == "expiring" else 120.0
        text = ""
        finished = False
        try:
            if kind == "unary":
                answer = await client.generate(
                    prompt(line), adapters=adapters or None, max_tokens=MAX_ANSWER_TOKENS, timeout=timeout
                )
                text, finished = answer.text, True
            else:
                async with client.stream(
                    prompt(line), adapters=adapters or None, max_tokens=MAX_ANSWER_TOKENS, timeout=timeout
                ) as stream:
                    async for chunk in stream:
                        text += chunk.text
                        finished = chunk.finish_reason is not None
                        if leave_after is not None and len(text) >= leave_after:
                            break
        except DeadlineExceededError:
            if kind != "expiring":
                self._faults.append(f"a request with {timeout:g} s ran out of time")
                self._events["errors: DEADLINE_EXCEEDED out of place"] += 1
                return
        except LoraplexError as error:
            self._fault(f"{kind} request: {error.code}: {error}", f"errors: {error.code}")
            return
        if finished:
            self._judged(task, line, text, self._book.judge(task, line, text))
            self._events[f"requests: {kind}, answered"] += 1
        else:
            self._judged(task, line, text, self._book.judge_beginning(task, line, text))
            self._events[f"requests: {kind}, broken off"] += 1

    async def _crasher(self) -> None:
        rng = random.Random(f"crasher {self._config.seed}")
        while self._running():
            await self._pause(rng.expovariate(1 / self._config.crash_interval_s))
            if not self._running():
                return
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "loraplex_bench.scenarios.crash_client", self._server.grpc, "4"),
                *rng.sample(self._served, 3),
                stdout=asyncio.subprocess.PIPE,
                env=child_environment(),
            )
            try:
                assert process.stdout is not None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(30):
                        await process.stdout.readline()
                await asyncio.sleep(rng.uniform(0, 0.3))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                code = await process.wait()
            if code == -signal.SIGKILL:
                self._events["clients killed in mid-stream"] += 1
            else:
                self._fault(f"a client ended by itself with exit code {code}", "errors: client")

    async def _adapter_keeper(self, client: AsyncClient) -> None:
        """Loads an adapter, uses it, unloads it while it is in use; asks for impossible things too."""
        rng = random.Random(f"keeper {self._config.seed}")
        for round_number in range(1 << 30):
            if not self._running():
                return
            source = rng.choice(self._spare)
            task = source.name
            name = f"{task}.{round_number}"
            try:
                await client.adapters.load(name, source)
                self._events["adapters loaded"] += 1
                requests = [
                    asyncio.create_task(self._use_loaded(client, name, task, line))
                    for line in rng.sample(self._lines[task], min(4, len(self._lines[task])))
                ]
                await asyncio.sleep(rng.uniform(0, 0.2))
                remaining = await client.adapters.unload(name)
                self._events["adapters unloaded"] += 1
                await asyncio.gather(*requests)
                if name in {adapter.name for adapter in remaining}:
                    self._fault(f"{name} was unloaded and is listed still", "errors: unload")
            except LoraplexError as error:
                self._fault(f"loading and unloading {name}: {error.code}: {error}", f"errors: {error.code}")
            await self._must_fail(
                client.generate("x\n", adapter=name, max_tokens=1), NotFoundError, "unloaded name"
            )
            await self._must_fail(
                client.adapters.load("missing", source / "nothing"), NotFoundError, "no folder"
            )
            outside = source.parent.parent
            await self._must_fail(
                client.adapters.load("outside", outside), PermissionDeniedError, "outside the roots"
            )
            await self._pause(rng.uniform(0.2, 1.5))

    async def _use_loaded(self, client: AsyncClient, name: str, task: str, line: str) -> None:
        """Asks an adapter that may be unloaded meanwhile: a whole right answer, or NOT_FOUND."""
        try:
            answer = await client.generate(
                prompt(line), adapter=name, max_tokens=MAX_ANSWER_TOKENS, timeout=120.0
            )
        except NotFoundError:
            self._events["requests: refused after unload"] += 1
            return
        except LoraplexError as error:
            self._fault(f"request to {name}: {error.code}: {error}", f"errors: {error.code}")
            return
        self._judged(task, line, answer.text, self._book.judge(task, line, answer.text))
        self._events["requests: to adapters loaded at run time"] += 1

    async def _publish_first(self, client: AsyncClient) -> None:
        """Registers the adapter that changes, and finds lines that all its versions answer rightly."""
        lines = random.Random(f"changing {self._config.seed}").sample(sure_lines(), LINES_PER_ADAPTER)
        await client.adapters.load(CHANGING, self._spare[0])
        for source in self._spare[:2]:
            await client.adapters.load(CHANGING, source, load_inplace=True)
            self._versions = [Version(source.name, time.monotonic())]
            answers = await asyncio.gather(
                *(
                    client.generate(prompt(line), adapter=CHANGING, max_tokens=MAX_ANSWER_TOKENS)
                    for line in lines
                )
            )
            lines = [
                line
                for line, answer in zip(lines, answers, strict=True)
                if answer.text == expected(source.name, line)
            ]
        self._changing_lines = lines
        self._lines[CHANGING] = lines
        if not lines:
            raise LookupError(
                f"no line is answered rightly by {self._spare[0].name} and {self._spare[1].name}"
            )

    async def _replacer(self, client: AsyncClient) -> None:
        """Replaces an adapter in place, again and again, while it is in use."""
        rng = random.Random(f"replacer {self._config.seed}")
        while self._running():
            await self._pause(rng.uniform(0.2, 1.5))
            source = next(path for path in self._spare[:2] if path.name != self._versions[-1].task)
            old, new = self._versions[-1], Version(source.name, time.monotonic())
            self._versions.append(new)
            try:
                await client.adapters.load(CHANGING, source, load_inplace=True)
            except LoraplexError as error:
                self._fault(f"replacing {CHANGING}: {error.code}: {error}", f"errors: {error.code}")
                new.until_s = time.monotonic()
                continue
            old.until_s = time.monotonic()
            self._events["adapters replaced in place"] += 1

    async def _ask_changing(self, client: AsyncClient, line: str) -> None:
        """A request that begins after a replacement was acknowledged must be answered by the new version."""
        begin_s = time.monotonic()
        try:
            answer = await client.generate(
                prompt(line), adapter=CHANGING, max_tokens=MAX_ANSWER_TOKENS, timeout=120.0
            )
        except LoraplexError as error:
            self._fault(f"request to {CHANGING}: {error.code}: {error}", f"errors: {error.code}")
            return
        end_s = time.monotonic()
        judgements = [
            self._book.judge(task, line, answer.text)
            for task in possible_tasks(self._versions, begin_s, end_s)
        ]
        best = next((one for one in judgements if one.verdict is Verdict.RIGHT), judgements[-1])
        self._judged(CHANGING, line, answer.text, best)
        self._events["requests: to the adapter that changes"] += 1
        # Only what a request may still be answered by is kept.
        self._versions = [one for one in self._versions if one.until_s > end_s - 150.0]

    async def _pinner(self, client: AsyncClient) -> None:
        """Pins one adapter for a while, then takes the pin away."""
        rng = random.Random(f"pinner {self._config.seed}")
        while self._running():
            name = rng.choice(self._served)
            try:
                await client.adapters.pin(name)
                self._events["adapters pinned"] += 1
                await self._pause(rng.uniform(0.5, 3.0))
                await client.adapters.pin(name, False)
            except LoraplexError as error:
                self._fault(f"pinning {name}: {error.code}: {error}", f"errors: {error.code}")
            await self._pause(rng.uniform(0.2, 1.0))

    async def _sampler(self, started: float) -> None:
        while self._running():
            memory = await asyncio.to_thread(self._server.memory_bytes)
            if memory:
                self._memory.append(
                    MemorySample(time.monotonic() - started, memory["rss"], memory["anonymous"])
                )
            if not self._server.running:
                raise LaunchError(f"the server ended during the soak\n{self._server.log_tail()}")
            await self._pause(min(1.0, self._config.duration_s / 60))

    # Afterwards.

    async def _wait_idle(self, timeout_s: float = 30.0) -> float | None:
        """Seconds until the server had neither running nor waiting requests; None if it never did."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            if _busy(await self._scrape()) == 0:
                return time.monotonic() - started
            await asyncio.sleep(0.2)
        return None

    async def _audited(self, timeout_s: float = 60.0) -> Metrics:
        """The metrics once the engine, idle, has looked at its pools and weights again.

        An audit may have begun before the last request: the one that counts is that after which no more
            comes.
        """
        first = metrics = await self._scrape()
        started = changed = time.monotonic()
        while time.monotonic() - started < timeout_s:
            await asyncio.sleep(0.5)
            latest = await self._scrape()
            if latest.get("loraplex_audits") != metrics.get("loraplex_audits"):
                changed = time.monotonic()
            metrics = latest
            new = metrics.get("loraplex_audits") != first.get("loraplex_audits")
            if new and time.monotonic() - changed > AUDIT_INTERVAL_S:
                return metrics
        self._fault(f"the engine did not audit itself within {timeout_s:g} s", "errors: no audit")
        return metrics

    async def _scrape(self) -> Metrics:
        assert self._server.metrics is not None
        return await asyncio.to_thread(scrape, self._server.metrics)

    async def _verify_all(self, client: AsyncClient) -> None:
        """Every adapter once more, all at once."""

        async def ask(task: str | None) -> None:
            line = self._lines[task][0]
            try:
                answer = await client.generate(
                    prompt(line), adapter=task, max_tokens=MAX_ANSWER_TOKENS, timeout=120
                )
            except LoraplexError as error:
                self._fault(f"afterwards, {task or 'base'}: {error.code}: {error}", f"errors: {error.code}")
                return
            self._judged(task, line, answer.text, self._book.judge(task, line, answer.text))
            self._events["requests: afterwards"] += 1

        await asyncio.gather(*(ask(task) for task in (None, *self._served)))

    def _answers_check(self) -> Check:
        bad = {key: count for key, count in self._events.items() if key.startswith(("answers: ", "errors: "))}
        right = bad.pop("answers: right", 0)
        found = (
            ", ".join(f"{count} {key}" for key, count in sorted(bad.items()))
            or "none wrong, none leaked, no error"
        )
        return Check("answers", right > 0 and not bad, f"{right} right; {found}")

    def _leak_checks(self, adapters: Sequence[AdapterInfo], metrics: Metrics) -> Iterator[Check]:
        yield _zero("KV blocks free", metrics, "loraplex_kv_cache_blocks_used", "in use")
        held = {adapter.name: adapter.references for adapter in adapters if adapter.references}
        yield Check("adapter references free", not held, f"held: {held}" if held else "none held")
        resident = [adapter.name for adapter in adapters if adapter.state is AdapterState.DEVICE]
        yield Check(
            "slots within their number",
            len(resident) <= self._config.slots,
            f"{len(resident)} of {self._config.slots}",
        )
        names = {adapter.name for adapter in adapters}
        odd = [a.name for a in adapters if a.draining or a.pinned]
        yield Check(
            "adapters as at the start",
            names == set(self._served) and not odd,
            f"{len(names)} registered" + (f", draining or pinned: {odd}" if odd else ""),
        )
        yield _zero("pools intact", metrics, "loraplex_integrity_problems", "problems")

    def _coverage_check(self, adapters: Sequence[AdapterInfo]) -> Check:
        """A soak in which nothing was evicted, killed or broken off would prove little."""
        evictions = sum(adapter.evictions for adapter in adapters)
        self._events["adapter evictions"] = evictions
        self._events["adapter hits"] = sum(adapter.hits for adapter in adapters)
        self._events["adapter misses"] = sum(adapter.misses for adapter in adapters)
        wanted = (
            "requests: cancelled, broken off",
            "requests: expiring, broken off",
            "requests: weighted, answered",
            "clients killed in mid-stream",
            "adapters loaded",
            "adapters replaced in place",
            "requests: to the adapter that changes",
            "adapters pinned",
            "adapter evictions",
        )
        missing = [name for name in wanted if not self._events[name]]
        return Check(
            "everything happened", not missing, f"never: {', '.join(missing)}" if missing else "all kinds"
        )

    # Helpers.

    def _judged(self, task: str | None, line: str, text: str, judgement: Judgement) -> None:
        self._events[f"answers: {judgement.verdict}"] += 1
        if judgement.verdict is not Verdict.RIGHT:
            owner = f" (that of {judgement.owner})" if judgement.owner else ""
            self._faults.append(f"{task or 'base'}: {line!r} -> {text!r}, {judgement.verdict}{owner}")

    def _fault(self, text: str, event: str) -> None:
        self._faults.append(text)
        self._events[event] += 1

    async def _must_fail(self, call: Awaitable[Any], error_class: type[LoraplexError], what: str) -> None:
        try:
            await call
        except error_class:
            self._events["impossible requests refused"] += 1
        except LoraplexError as error:
            self._fault(f"{what}: {error.code} instead of {error_class.default_code}", f"errors: {what}")
        else:
            self._fault(f"{what}: accepted", f"errors: {what}")

    def _spare_tasks(self) -> list[Path]:
        """Spare adapters whose task is not served from the start: their lines must be screened too."""
        return [path for path in self._spare if path.name not in self._served]

    def _spare_path(self, task: str) -> Path:
        return next(path for path in self._spare if path.name == task)

    def _running(self) -> bool:
        return time.monotonic() < self._deadline

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, min(seconds, self._deadline - time.monotonic())))

    def _describe(self, started: float) -> str:
        answered = sum(count for key, count in self._events.items() if key.endswith(", answered"))
        memory = _mib(self._memory[-1].anonymous) if self._memory else "?"
        return (
            f"{time.monotonic() - started:.0f}/{self._config.duration_s:.0f} s | {answered} answered | "
            f"{self._events['clients killed in mid-stream']} clients killed | {len(self._faults)} faults"
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


def _zero(name: str, metrics: Metrics, metric: str, what: str) -> Check:
    """Passed if the metric is there and 0."""
    value = metrics.get(metric)
    found = f"the server exposes no {metric}" if value is None else f"{value:g} {what}"
    return Check(name, value == 0, found)


def _busy(metrics: Metrics) -> float:
    return metrics.value("loraplex_requests_running") + metrics.value("loraplex_requests_waiting")


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
