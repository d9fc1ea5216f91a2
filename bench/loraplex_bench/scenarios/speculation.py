"""`loraplex bench speculation`: the gain of speculation, and its cost."""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from loraplex import Client, LoraplexError
from loraplex_bench.demo.tasks import TASKS, expected, prompt, sure_lines
from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchedServer, LaunchError, demo_flags
from loraplex_bench.load.options import add_count, add_output, add_quantization, settings_of
from loraplex_bench.load.results import milliseconds, table, write_result

DESCRIPTION = """\
A server on the embedded demo model is asked the same lines with and without speculation, in turns and one
at a time: the base, which copies its line, and adapters that change little of it, or every letter. Compares
the time from the first token to the last at the client, and the answers: they have to be right and the same.
"""

EXAMPLES = """\
examples:
  loraplex bench speculation
      up to 8 draft tokens a step, 40 lines each for the base and three adapters
  loraplex bench speculation --speculative-tokens 4 --quantization int4 --output results
      fewer, on another base, with a table and the raw numbers in results/

the exit code is 1 if an answer differs or is wrong.
"""

BASE = "(base)"
OWNERS = (BASE, "redact", "snake", "atbash")
"""Asked for a copy, for one with other digits, with other spaces, and with no letter as it was."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    speculative_tokens: int = 8
    num_requests: int = 40
    quantization: str = "nf4"
    threads: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        speculation: the request asked for draft tokens.
        decode_s: from the first token to the last, at the client.
    """

    owner: str
    line: str
    speculation: bool
    decode_s: float
    text: str
    tokens: int
    drafted: int
    accepted: int


@dataclasses.dataclass(frozen=True)
class Row:
    """An owner's answers.

    Attributes:
        plain_s, speculative_s: median time from an answer's first token to its last.
        speedup: of all answers' time together.
        per_step: tokens of a decode step.
        right: accepted share of the draft tokens.
    """

    owner: str
    plain_s: float
    speculative_s: float
    speedup: float
    per_step: float
    right: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Lines whose two answers differ, and answers that are wrong, each with its owner."""

    different: tuple[tuple[str, str], ...]
    wrong: tuple[tuple[str, str], ...]
    answers: int

    @property
    def good(self) -> bool:
        return not self.different and not self.wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench speculation`."""
    config = Config()

    add_count(parser, "--speculative-tokens", config.speculative_tokens, "most draft tokens a step")
    add_count(parser, "--num-requests", config.num_requests, "lines for each owner")
    add_count(parser, "--threads", config.threads, "CPU threads of the server")
    add_count(parser, "--seed", config.seed, "same seed, same lines")
    add_quantization(parser, config.quantization)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, and returns the exit code."""
    config = settings_of(Config, args)
    if config.num_requests < 1:
        print(
            f"loraplex bench speculation: --num-requests {config.num_requests} is less than 1",
            file=sys.stderr,
        )
        return 2
    try:
        records = _measure(config)
    except (LaunchError, LoraplexError) as error:
        print(f"loraplex bench speculation: {error}", file=sys.stderr)
        return 2
    rows, verdict = summarize(records), judge(records)
    text = render(config, rows, verdict)
    print(text)
    if args.output is not None:
        document = {
            "environment": environment(),
            "config": config,
            "rows": rows,
            "verdict": verdict,
            "requests": records,
        }
        print(f"\nraw numbers: {write_result(args.output, 'speculation', text, document)}.json")
    return 0 if verdict.good else 1


def summarize(records: Sequence[Record]) -> list[Row]:
    """A row for each owner, in the order of the records."""
    rows = []
    for owner in dict.fromkeys(record.owner for record in records):
        plain, speculative = (
            [record for record in records if record.owner == owner and record.speculation == speculation]
            for speculation in (False, True)
        )
        steps = sum(record.tokens - 1 - record.accepted for record in speculative)
        rows.append(
            Row(
                owner,
                statistics.median(record.decode_s for record in plain),
                statistics.median(record.decode_s for record in speculative),
                sum(record.decode_s for record in plain) / sum(record.decode_s for record in speculative),
                sum(record.tokens - 1 for record in speculative) / max(steps, 1),
                sum(record.accepted for record in speculative)
                / max(sum(record.drafted for record in speculative), 1),
            )
        )
    return rows


def judge(records: Sequence[Record]) -> Verdict:
    """Compares the answers with each other and with the right ones."""
    answers: dict[tuple[str, str], set[str]] = {}
    for record in records:
        answers.setdefault((record.owner, record.line), set()).add(record.text)
    return Verdict(
        tuple(key for key, found in answers.items() if len(found) > 1),
        tuple(
            (owner, line)
            for (owner, line), found in answers.items()
            if found != {expected(None if owner == BASE else owner, line)}
        ),
        len(answers),
    )


def render(config: Config, rows: Sequence[Row], verdict: Verdict) -> str:
    """The printed table."""
    same = verdict.answers - len(verdict.different)
    lines = [
        f"demo model, {config.quantization}, {config.threads} thread(s); one request at a time, "
        f"{config.num_requests} lines each, up to {config.speculative_tokens} draft tokens a step",
        "",
        table(
            [
                "answers of",
                "decode ms",
                "with speculation",
                "times faster",
                "tokens a step",
                "drafts accepted",
            ],
            [
                (
                    row.owner,
                    milliseconds(row.plain_s),
                    milliseconds(row.speculative_s),
                    f"{row.speedup:.2f}",
                    f"{row.per_step:.2f}",
                    f"{row.right:.0%}",
                )
                for row in rows
            ],
        ),
        "",
        f"answers with and without speculation: {same} of {verdict.answers} are the same; "
        f"{len(verdict.wrong)} are wrong",
    ]
    return "\n".join(lines)


def _measure(config: Config) -> list[Record]:
    lines = random.Random(config.seed).choices(sure_lines(), k=config.num_requests)
    records = []
    flags = [*demo_flags(quantization=config.quantization), "--threads", str(config.threads)]
    with LaunchedServer(flags) as server, Client(server.grpc, retry=None) as client:
        for owner in OWNERS:
            assert owner == BASE or owner in TASKS
            for speculation in (False, True):
                _ask(client, owner, lines[0], config.speculative_tokens if speculation else 0)
            for index, line in enumerate(lines):
                # In turns, each first as often as the other.
                for speculation in (False, True) if index % 2 else (True, False):
                    answer = _ask(client, owner, line, config.speculative_tokens if speculation else 0)
                    records.append(Record(owner, line, speculation, *answer))
            print(f"asked for {owner}", file=sys.stderr, flush=True)
    return records


class _Answer(NamedTuple):
    """Seconds from the first token to the last, the text, its tokens, and the draft tokens among them."""

    decode_s: float
    text: str
    tokens: int
    drafted: int
    accepted: int


def _ask(client: Client, owner: str, line: str, most: int) -> _Answer:
    first_s, text, usage = 0.0, "", None
    adapter = None if owner == BASE else owner
    with client.stream(prompt(line), adapter=adapter, speculative_tokens=most, cache_prefix=False) as stream:
        for chunk in stream:
            first_s = first_s or time.perf_counter()
            text += chunk.text
            usage = chunk.usage or usage
    decode_s = time.perf_counter() - first_s
    assert usage is not None
    return _Answer(decode_s, text, usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens)
