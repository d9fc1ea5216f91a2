"""`loraplex bench api-cost`: the API's cost beside the engine, a message and a token."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, child_environment
from loraplex_bench.load.options import add_count, add_output
from loraplex_bench.load.results import Distribution, milliseconds, table, write_result
from loraplex_bench.scenarios.api_cost.client import TEXTS_FILE, Order, Sample
from loraplex_bench.scenarios.api_cost.engine import PID_FILE, TOKENS_FILE

DESCRIPTION = """\
The real server (interceptors, detokeniser, metrics) on an engine that has every token ready at once, in a
process of its own and behind the engine's own socket, and one client process with all the streams. Measures
messages and tokens a second, processor time a message, and how long a token is held between engine and
client; beside it a bare grpc.aio server that sends messages of the same size.
"""

EXAMPLES = """\
examples:
  loraplex bench api-cost
      256 streams
  loraplex bench api-cost --repeat 5 --output results
      the median of five, with a table and the raw numbers in results/
  loraplex bench api-cost --streams 8 --seconds 1 --repeat 1
      a quick try

the exit code is 1 if a stream's tokens or text are not what the engine gave. Linux only.
"""

_VOCABULARY = 8192
_GOAL_MESSAGES, _GOAL_CPU_US = 9_000, 60
_GOAL_TOKENS, _GOAL_HELD_S = 30_000, 0.050
# Above the goal, since what is paced cannot be faster than its pace.
_PRESSED = 32_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to be driven.

    Attributes:
        server: "bare", "alone" (tokens are never joined) or "joining", as it is by default.
        rate: tokens per second that the engine gives all streams together; 0 is all at once.
        speed: tokens per second that are expected, from which follows how many there are.
    """

    name: str
    server: str
    rate: float
    speed: float


CASES = (
    Case("bare grpc.aio", "bare", rate=0, speed=12_000),
    Case("one a message", "alone", rate=0, speed=9_000),
    Case("slow", "joining", rate=2_560, speed=2_560),
    Case("pressed", "joining", rate=_PRESSED, speed=_PRESSED),
    Case("flooded", "joining", rate=0, speed=60_000),
)

_FLAGS: Mapping[str, tuple[str, ...]] = {"alone": ("--max-tokens-per-message", "1"), "joining": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench api-cost`."""
    for flag, default, help_text in (
        ("--streams", 256, "calls at once"),
        ("--seconds", 5, "of each measurement, about"),
        ("--repeat", 3, "measurements of each case, of which the median counts"),
    ):
        add_count(parser, flag, default, help_text)
    parser.add_argument(
        "--case",
        action="append",
        choices=[case.name for case in CASES],
        help="only this one; may be repeated",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, and returns the exit code."""
    for flag, value in (("--streams", args.streams), ("--seconds", args.seconds), ("--repeat", args.repeat)):
        if value < 1:
            print(f"loraplex bench api-cost: {flag} {value} is less than 1", file=sys.stderr)
            return 2
    cases = [case for case in CASES if not args.case or case.name in args.case]
    try:
        samples = measure(cases, args.streams, args.seconds, args.repeat)
    except (LaunchError, subprocess.SubprocessError) as error:
        print(f"loraplex bench api-cost: {error}", file=sys.stderr)
        return 2
    text = render(samples, args.streams)
    print(text)
    if args.output is not None:
        document = {
            "kind": "api-cost",
            "environment": environment(),
            "streams": args.streams,
            "cases": cases,
            "samples": samples,
        }
        print(f"\nraw numbers: {write_result(args.output, 'api-cost', text, document)}.json")
    return 1 if any(sample.wrong for found in samples.values() for sample in found) else 0


def measure(cases: Sequence[Case], streams: int, seconds: float, repeat: int) -> dict[str, list[Sample]]:
    """Each case's samples, taken in turns, so that what else the machine does falls on all alike."""
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="loraplex-api-cost-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        texts = _write_text(folder)
        bare_text = texts[0].ljust(round(statistics.mean(map(len, texts))), "-")
        servers: dict[str, tuple[LaunchedServer, tuple[int, ...]]] = {}
        for kind in dict.fromkeys(case.server for case in cases):
            servers[kind] = stack.enter_context(_server(folder / kind, kind, bare_text))
        for turn in range(repeat):
            for case in cases:
                server, pids = servers[case.server]
                tokens = max(4, round(case.speed * seconds / streams) + 2)
                where = "" if case.server == "bare" else str(folder / case.server)
                order = Order(server.grpc, streams, tokens, case.rate, pids, where)
                samples[case.name].append(_sample(order))
                print(f"{case.name}: {turn + 1} of {repeat}", file=sys.stderr, flush=True)
    return samples


def render(samples: Mapping[str, Sequence[Sample]], streams: int) -> str:
    """The printed table."""
    rows = []
    median = {name: sorted(found, key=_speed)[len(found) // 2] for name, found in samples.items()}
    for name, sample in median.items():
        client, server, *engine = (f"{cpu_s / sample.messages * 1e6:.1f}" for cpu_s in sample.cpu_s)
        held = sample.held_s
        times = ["-"] * 3 if held is None else [milliseconds(s) for s in (held.p50, held.p99, held.max)]
        counts = [f"{sample.messages_per_s:.0f}", f"{sample.tokens_per_s:.0f}", sample.joined, sample.most]
        rows.append([name, *counts, server, *(engine or ["-"]), client, *times])
    columns = ["case", "messages/s", "tokens/s", "joined", "most", "server", "engine", "client"]
    lines = [
        f"{streams} streams; CPU microseconds a message by process; milliseconds a token is held",
        "",
        table([*columns, "held p50", "p99", "max"], rows),
        "",
        *_goals(median),
        f"streams with a wrong answer: {sum(sample.wrong for found in samples.values() for sample in found)}",
    ]
    return "\n".join(lines)


def _goals(median: Mapping[str, Sample]) -> list[str]:
    lines = []
    if (sample := median.get("one a message")) is not None:
        server_us = sample.cpu_s[1] / sample.messages * 1e6
        bare = median.get("bare grpc.aio")
        share = None if bare is None else sample.messages_per_s / bare.messages_per_s
        beside = "" if share is None else f", {share:.0%} of bare grpc.aio"
        lines += [
            _line(
                f"one token a message: {sample.messages_per_s:.0f} messages/s{beside}",
                f"{_GOAL_MESSAGES}",
                sample.messages_per_s >= _GOAL_MESSAGES,
            ),
            _line(f"server CPU: {server_us:.1f} us a message", f"{_GOAL_CPU_US}", server_us <= _GOAL_CPU_US),
        ]
    if (sample := median.get("slow")) is not None:
        lines.append(_line(f"not behind: {sample.joined} messages joined", "0", not sample.joined))
    if (sample := median.get("pressed")) is not None and sample.held_s is not None:
        lines += [
            _line(
                f"behind: {sample.tokens_per_s:.0f} tokens/s",
                f"{_GOAL_TOKENS}",
                sample.tokens_per_s >= _GOAL_TOKENS,
            ),
            _line(
                f"longest a token is held: {milliseconds(sample.held_s.max)} ms",
                milliseconds(_GOAL_HELD_S),
                sample.held_s.max <= _GOAL_HELD_S,
            ),
        ]
    return lines


def _line(text: str, goal: str, met: bool) -> str:
    return f"{text} (goal: {goal}): {'met' if met else 'missed'}"


def _speed(sample: Sample) -> float:
    return sample.tokens_per_s


def _write_text(folder: Path) -> list[str]:
    """Trains a tokenizer on Python's own help and writes it for each real server; the texts of the tokens."""
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    prose = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(prose.splitlines(keepends=True), trainer)
    tokens = raw.encode(prose).ids
    texts = [raw.decode([token]) for token in tokens]
    for kind in _FLAGS:
        home = folder / kind
        PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(home)
        (home / TOKENS_FILE).write_text(json.dumps(tokens))
        (home / TEXTS_FILE).write_text(json.dumps(texts))
    return texts


@contextlib.contextmanager
def _server(folder: Path, kind: str, bare_text: str) -> Iterator[tuple[LaunchedServer, tuple[int, ...]]]:
    command = (sys.executable, "-m", "loraplex_bench.scenarios.api_cost.servers")
    flags = ("bare", bare_text) if kind == "bare" else ("real", str(folder), *_FLAGS[kind])
    with LaunchedServer(flags, command=command) as server:
        engine = () if kind == "bare" else (int((folder / PID_FILE).read_text()),)
        yield server, (server.pid, *engine)


def _sample(order: Order) -> Sample:
    command = [
        sys.executable,
        "-m",
        "loraplex_bench.scenarios.api_cost.client",
        json.dumps(dataclasses.asdict(order)),
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=600, env=child_environment(None)
    )
    found = json.loads(done.stdout)
    held = found.pop("held_s")
    return Sample(**found, held_s=None if held is None else Distribution(**held))
