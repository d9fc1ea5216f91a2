"""`loraplex demo`: a real server, twelve adapters and the base asked at once, and every answer checked.

Nothing is faked: the server is a process of its own with the embedded 4-bit model, the requests go through
the SDK over gRPC, all at the same time, and there are fewer adapter slots on the device than adapters, so
that the adapter cache has to work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from loraplex import AdapterInfo, AsyncClient, LoraplexError, ModelInfo
from loraplex.cli.exposition import Metrics, scrape
from loraplex_bench.demo.tasks import MAX_ANSWER_TOKENS, MAX_LINE_LENGTH, TASKS, data_dir, prompt, sure_lines
from loraplex_bench.load.answers import UNCHECKED, AnswerBook, Judgement, Verdict
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, demo_flags
from loraplex_bench.load.results import Distribution, milliseconds, table
from loraplex_bench.load.workload import adapters_label

DESCRIPTION = """\
Starts the real server on the embedded demo model (4-bit, with adapters that each transform text in their own
way), asks many adapters and the base at once through the SDK, shows every answer and whether it is right, and
stops the server. The exit code is 0 only if every answer was right and the server stopped cleanly.
"""

Mix = tuple[tuple[str, float], ...]
"""Adapters with their weights."""

MARKS = {Verdict.RIGHT: "right", Verdict.WRONG: "WRONG", Verdict.LEAK: "LEAK", Verdict.UNCHECKED: ""}


@dataclasses.dataclass
class Answer:
    """One line, what has come back so far, and what it is worth once complete."""

    line: str
    text: str = ""
    tokens: int = 0
    ttft_s: float | None = None
    judgement: Judgement | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        return self.judgement is not None or self.error is not None


@dataclasses.dataclass
class Lane:
    """All lines asked of one adapter, of the base, or of one composition.

    Attributes:
        does: what its answers should be, in words.
        expect: the right answer to a line; None where it is shown only.
        rank: of all its adapters together; 0 for the base.
    """

    adapters: Mix
    does: str
    expect: Callable[[str], str] | None
    rank: int
    answers: list[Answer]

    @property
    def judged(self) -> bool:
        return self.expect is not None

    @property
    def label(self) -> str:
        return adapters_label(self.adapters)

    @property
    def done(self) -> bool:
        return all(answer.done for answer in self.answers)

    @property
    def right(self) -> int:
        return sum(a.judgement is not None and a.judgement.verdict is Verdict.RIGHT for a in self.answers)

    @property
    def shown(self) -> Answer:
        """The answer to show: one that went wrong, else one that is coming in, else the last."""
        bad = (a for a in self.answers if a.done and self.judged and not _is_right(a))
        coming = (a for a in self.answers if not a.done and a.text)
        return next(bad, None) or next(coming, None) or self.answers[-1]

    @property
    def score(self) -> str:
        return f"{self.right}/{len(self.answers)}" if self.judged else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; answers with the exit code."""
    parser = argparse.ArgumentParser(prog="loraplex demo", description=DESCRIPTION)
    parser.add_argument(
        "--adapters", type=int, default=12, metavar="N", help="adapters to ask (default: %(default)s)"
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=4,
        metavar="N",
        help="adapters on the device at once (default: %(default)s)",
    )
    parser.add_argument(
        "--lines", type=int, default=8, metavar="N", help="lines for each (default: %(default)s)"
    )
    parser.add_argument(
        "--quantization",
        choices=("nf4", "int4", "none"),
        default="nf4",
        help="of the base (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the lines (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.adapters < 1 or args.lines < 1:
        parser.error("--adapters and --lines must be at least 1")
    if args.slots < 3:
        parser.error("--slots must be at least 3: one request names three adapters")
    try:
        return _demo(args)
    except (LaunchError, LoraplexError, OSError) as error:
        print(f"loraplex demo: {error}", file=sys.stderr)
        return 2


def _demo(args: argparse.Namespace) -> int:
    print(
        f"Starting a server: the {args.quantization} base, room for {args.slots} adapters on the device.",
        flush=True,
    )
    flags = [*demo_flags(quantization=args.quantization), "--max-adapters-on-device", str(args.slots)]
    with LaunchedServer(flags) as server:
        print(
            f"Ready after {server.start_s:.1f} s: gRPC at {server.grpc}, metrics at {server.metrics}.",
            flush=True,
        )
        good = asyncio.run(_converse(server, args))
        code = server.stop()
    print(f"Server stopped with exit code {code}.")
    return 0 if good and code == 0 else 1


async def _converse(server: LaunchedServer, args: argparse.Namespace) -> bool:
    """Everything between start and stop of the server. True if every judged answer was right."""
    async with AsyncClient(server.grpc) as client:
        model = await client.model()
        known = {adapter.name: adapter for adapter in await client.adapters.list()}
        names = [name for name in TASKS if name in known][: args.adapters]
        lines = itertools.cycle(_shuffled(sure_lines(), args.seed))

        def lane(adapters: Mix, does: str, expect: Callable[[str], str] | None) -> Lane:
            rank = sum(known[name].rank for name, _ in adapters if name in known)
            return Lane(adapters, does, expect, rank, [Answer(next(lines)) for _ in range(args.lines)])

        tasks = (TASKS[name] for name in names)
        lanes = [lane((), "copies the line", lambda line: line)]
        lanes += [lane(((task.name, 1.0),), task.description, task.apply) for task in tasks]
        book = AnswerBook(answer.line for each in lanes for answer in each.answers)
        print(_describe(model, len(names)))
        print(f"{len(lanes) * args.lines} requests at once, {args.lines} to each of these:\n", flush=True)
        started = time.monotonic()
        async with _display(lanes):
            await asyncio.gather(*(_ask(client, each, book) for each in lanes))
        elapsed_s = time.monotonic() - started
        after = {adapter.name: adapter for adapter in await client.adapters.list()}

        mixtures = await _mixtures(client, names[-1], lane)
        print("\nSeveral adapters in one request, summed with their weights:\n", flush=True)
        async with _display(mixtures):
            await asyncio.gather(*(_ask(client, each, book) for each in mixtures))

    assert server.metrics is not None
    metrics = await asyncio.to_thread(scrape, server.metrics)
    print(f"\n{_throughput(lanes, elapsed_s)}\n{_cache(known, after, metrics, args.slots)}")
    return _verdict([*lanes, *mixtures])


async def _mixtures(client: AsyncClient, whole: str, lane: Callable[..., Lane]) -> list[Lane]:
    """Compositions: two with answers that are known, and one to look at.

    Two halves of an adapter are that adapter; the second half is loaded under a name of its own while the
    server runs. And two adapters that change different characters do both when they are summed.
    """
    twin = f"{whole}-twin"
    await client.adapters.load(twin, data_dir() / "adapters" / whole)
    both = _in_turn("vowelmask", "redact")
    return [
        lane(((whole, 0.5), (twin, 0.5)), f"two halves: {TASKS[whole].description}", TASKS[whole].apply),
        lane((("vowelmask", 0.8), ("redact", 0.8)), "both: vowels become *, digits #", both),
        lane((("upper", 0.7), ("snake", 0.7), ("rot5", 0.7)), "mostly all three: not judged", None),
    ]


def _in_turn(*names: str) -> Callable[[str], str]:
    """The tasks of these names, one after the other."""
    return lambda line: functools.reduce(lambda text, name: TASKS[name].apply(text), names, line)


async def _ask(client: AsyncClient, lane: Lane, book: AnswerBook) -> None:
    await asyncio.gather(*(_ask_one(client, lane, answer, book) for answer in lane.answers))


async def _ask_one(client: AsyncClient, lane: Lane, answer: Answer, book: AnswerBook) -> None:
    started = time.monotonic()
    try:
        async for chunk in client.stream(
            prompt(answer.line),
            adapters=list(lane.adapters) or None,
            max_tokens=MAX_ANSWER_TOKENS,
            timeout=60.0,
        ):
            if chunk.token_ids and answer.ttft_s is None:
                answer.ttft_s = time.monotonic() - started
            answer.tokens += len(chunk.token_ids)
            answer.text += chunk.text
    except LoraplexError as error:
        answer.error = str(error)
        return
    if lane.expect is None:
        answer.judgement = UNCHECKED
    else:
        answer.judgement = book.judge_against(lane.expect(answer.line), answer.line, answer.text)


@contextlib.asynccontextmanager
async def _display(lanes: Sequence[Lane]) -> AsyncIterator[None]:
    """Shows the lanes while the body runs: a live table on a terminal, elsewhere a line as each lane is
    complete."""
    rich_table = _rich_table() if sys.stdout.isatty() else None
    if rich_table is None:
        task = asyncio.create_task(_plain_rows(lanes))
        try:
            yield
        except BaseException:
            task.cancel()
            raise
        await task
        return
    from rich.live import Live

    with Live(get_renderable=lambda: rich_table(lanes), refresh_per_second=15):
        yield


async def _plain_rows(lanes: Sequence[Lane]) -> None:
    width = max(len(lane.label) for lane in lanes)
    waiting = list(lanes)
    while waiting:
        for lane in [lane for lane in waiting if lane.done]:
            waiting.remove(lane)
            shown = lane.shown
            print(f"{lane.label.ljust(width)}  {lane.score:>4}  {shown.line} -> {_text(shown)}", flush=True)
        await asyncio.sleep(0.02)


def _rich_table() -> Callable[[Sequence[Lane]], Any] | None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # rich comes with the extra bench
        return None

    wide = Console().width >= 140

    def draw(lanes: Sequence[Lane]) -> Any:
        drawing = Table()
        drawing.add_column("adapter", no_wrap=True)
        if wide:
            drawing.add_column("rank", justify="right")
            drawing.add_column("what it does")
        for column in ("line", "answer"):
            drawing.add_column(column, no_wrap=True, min_width=MAX_LINE_LENGTH if wide else None)
        drawing.add_column("right", justify="right", no_wrap=True, min_width=5)
        drawing.add_column("TTFT ms", justify="right", no_wrap=True, min_width=7)
        for lane in lanes:
            shown = lane.shown
            bad = lane.judged and any(answer.done and not _is_right(answer) for answer in lane.answers)
            style = "bold red" if bad else "green" if lane.done and lane.judged else ""
            first = [answer.ttft_s for answer in lane.answers if answer.ttft_s is not None]
            drawing.add_row(
                lane.label,
                *((str(lane.rank or ""), lane.does) if wide else ()),
                Text(shown.line),
                Text(_text(shown), style=style),
                Text(lane.score, style=style),
                milliseconds(sum(first) / len(first)) if first else "",
            )
        return drawing

    return draw


def _text(answer: Answer) -> str:
    if answer.error is not None:
        return f"error: {answer.error}"
    if answer.judgement is None or answer.judgement.verdict in (Verdict.RIGHT, Verdict.UNCHECKED):
        return answer.text
    owner = f", the answer of {answer.judgement.owner}" if answer.judgement.owner else ""
    return f"{answer.text}  ({MARKS[answer.judgement.verdict]}{owner})"


def _is_right(answer: Answer) -> bool:
    return answer.judgement is not None and answer.judgement.verdict is Verdict.RIGHT


def _shuffled(lines: Sequence[str], seed: int) -> list[str]:
    return random.Random(seed).sample(lines, len(lines))


def _describe(model: ModelInfo, adapters: int) -> str:
    size = f"{model.parameters / 1e6:.1f} M parameters in {model.weight_bytes / 2**20:.1f} MiB"
    how = f"{model.quantization}, {model.dtype} on {model.device}"
    return f"{model.architecture}, {size} ({how}); {adapters} adapters and the base."


def _throughput(lanes: Sequence[Lane], elapsed_s: float) -> str:
    answers = [answer for lane in lanes for answer in lane.answers]
    tokens = sum(answer.tokens for answer in answers)
    ttft = Distribution.of(answer.ttft_s for answer in answers if answer.ttft_s is not None)
    latency = f"; TTFT p50 {milliseconds(ttft.p50)} ms, p99 {milliseconds(ttft.p99)} ms" if ttft else ""
    return f"{tokens} tokens in {elapsed_s:.2f} s: {tokens / elapsed_s:.0f} tokens/s over gRPC{latency}."


def _cache(
    before: dict[str, AdapterInfo], after: dict[str, AdapterInfo], metrics: Metrics, slots: int
) -> str:
    """The adapter cache's work: in the batch by AdapterService, since the start by the metrics."""
    counts = {
        name: sum(getattr(after[key], name) - getattr(before[key], name) for key in before)
        for name in ("hits", "misses", "evictions")
    }
    lines = [table(["adapter cache, in the batch", *counts], [[f"{slots} slots", *counts.values()]])]
    for kind, what in (("load", "from disk to host memory"), ("copy", "from host memory to the device")):
        number = metrics.get("loraplex_adapter_swap_in_seconds_count", kind=kind)
        seconds = metrics.get("loraplex_adapter_swap_in_seconds_sum", kind=kind)
        if number and seconds is not None:
            lines.append(f"{number:g} adapters brought {what}, {milliseconds(seconds / number)} ms each.")
    return "\n".join(lines)


def _verdict(lanes: Sequence[Lane]) -> bool:
    judged = [answer for lane in lanes if lane.judged for answer in lane.answers]
    right = sum(_is_right(answer) for answer in judged)
    failed = sum(answer.error is not None for lane in lanes for answer in lane.answers)
    errors = f", {failed} errors" if failed else ""
    print(f"\n{right} of {len(judged)} answers right{errors}.", flush=True)
    return right == len(judged) and not failed


if __name__ == "__main__":
    raise SystemExit(main())
