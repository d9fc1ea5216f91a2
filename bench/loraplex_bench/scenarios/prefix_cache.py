"""`loraplex bench prefix-cache`: what a shared beginning of prompts is worth, in time to the first token."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from loraplex import Client, LoraplexError
from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchedServer, LaunchError
from loraplex_bench.load.options import add_count, add_output, add_quantization, settings_of
from loraplex_bench.load.results import milliseconds, percentile, table, write_result
from loraplex_bench.peers.jobs import BenchModel

DESCRIPTION = """\
Two servers on one random Llama, one with and one without its prefix cache, are asked the same in turns:
prompts that begin alike (a system prompt, say) and end each in its own way, to the base and to an adapter,
one after the other, and at last all at once with a beginning that is new. Compares the time to the first
token at the client, and the answers, which have to be the same.
"""

EXAMPLES = """\
examples:
  loraplex bench prefix-cache
      a shared prefix of 400 tokens on a Llama of 125 M parameters, nf4
  loraplex bench prefix-cache --prefix-tokens 1500 --quantization int4 --output results
      a longer one on another base, with a table and the raw numbers in results/
  loraplex bench prefix-cache --small --prefix-tokens 100 --num-requests 3
      a quick try on a tiny model

the exit code is 1 if an answer differs or nothing was found in the cache.
"""

GOAL = 5.0
"""So many times shorter should the time to the first token be with a shared prefix of 400 tokens."""

MODES = ("off", "on")
_BASE = "(base)"
_AT_ONCE = "(base), all at once"
# The block that holds a prompt's last token is always computed.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """The requests.

    Attributes:
        num_requests: that follow the first one with the prefix, for each owner; and that are sent at once.
    """

    prefix_tokens: int = 400
    suffix_tokens: int = 16
    max_tokens: int = 16
    num_requests: int = 16
    quantization: str = "nf4"
    threads: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        mode: of the server's prefix cache.
        owner: the adapter, or "(base)", or "(base), all at once".
        index: 0 is the first request with its owner's prefix, from 1 on are those after it; those that are
            sent at once begin with 1.
    """

    mode: str
    owner: str
    index: int
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_prompt_tokens: int
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """An owner's requests at one server. Seconds at the client; all but the first request are the others.

    Attributes:
        first_ttft_s: None where all are sent at once.
    """

    mode: str
    owner: str
    first_ttft_s: float | None
    ttft_p50_s: float
    ttft_p90_s: float
    cached_share: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The comparison of the servers.

    Attributes:
        speedup: by how much the median time to the first token is shorter, by owner.
        different: (owner, index) of answers that are not the same.
    """

    speedup: Mapping[str, float]
    different: tuple[tuple[str, int], ...]
    answers: int
    cached: bool

    @property
    def good(self) -> bool:
        return self.cached and not self.different


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench prefix-cache`."""
    config = Config()

    add_count(parser, "--prefix-tokens", config.prefix_tokens, "tokens that all prompts begin with")
    add_count(parser, "--suffix-tokens", config.suffix_tokens, "tokens of a prompt's own after them")
    add_count(parser, "--max-tokens", config.max_tokens, "tokens of an answer")
    add_count(
        parser,
        "--num-requests",
        config.num_requests,
        "requests after the first, for the base and for the adapter",
    )
    add_count(parser, "--threads", config.threads, "CPU threads of each server")
    add_count(parser, "--seed", config.seed, "same seed, same prompts")
    add_quantization(parser, config.quantization)
    parser.add_argument("--small", action="store_true", help="a tiny model instead, to try the bench out")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, and returns the exit code."""
    config = settings_of(Config, args)
    for flag, value in (("--num-requests", config.num_requests), ("--suffix-tokens", config.suffix_tokens)):
        if value < 1:
            print(f"loraplex bench prefix-cache: {flag} {value} is less than 1", file=sys.stderr)
            return 2
    # Here, not above: `--help` should not wait for torch.
    from loraplex_bench.models.random_llama import make_random_llama

    try:
        with tempfile.TemporaryDirectory() as folder:
            _say("making a random model")
            model = make_random_llama(Path(folder), adapters=1, small=args.small)
            records = _measure(model, config)
    except (LaunchError, LoraplexError) as error:
        print(f"loraplex bench prefix-cache: {error}", file=sys.stderr)
        return 2
    rows, verdict = summarize(records), judge(records)
    text = render(model.label, config, rows, verdict)
    print(text)
    if args.output is not None:
        document = {
            "kind": "prefix-cache",
            "environment": environment(),
            "model": model.label,
            "config": config,
            "rows": rows,
            "verdict": verdict,
            "requests": records,
        }
        print(f"\nraw numbers: {write_result(args.output, 'prefix-cache', text, document)}.json")
    return 0 if verdict.good else 1


def summarize(records: Sequence[Record]) -> list[Row]:
    """A row for each owner at each server, in the order of the records."""
    rows = []
    for owner, mode in dict.fromkeys((record.owner, record.mode) for record in records):
        own = [record for record in records if (record.owner, record.mode) == (owner, mode)]
        first = next((record.ttft_s for record in own if not record.index), None)
        others = [record for record in own if record.index]
        times = sorted(record.ttft_s for record in others)
        rows.append(
            Row(
                mode,
                owner,
                first,
                statistics.median(times),
                percentile(times, 90),
                sum(record.cached_prompt_tokens for record in others)
                / sum(record.prompt_tokens for record in others),
            )
        )
    return rows


def judge(records: Sequence[Record]) -> Verdict:
    """Compares the two servers' times and answers."""
    medians = {(row.owner, row.mode): row.ttft_p50_s for row in summarize(records)}
    answers: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for record in records:
        answers.setdefault((record.owner, record.index), set()).add(record.token_ids)
    missed = Counter(
        record.owner for record in records if record.mode == "on" and not record.cached_prompt_tokens
    )
    return Verdict(
        {owner: medians[owner, "off"] / value for (owner, mode), value in medians.items() if mode == "on"},
        tuple(key for key, found in answers.items() if len(found) > 1),
        len(answers),
        # Whoever is served first finds nothing.
        max(missed.values(), default=0) <= 1,
    )


def render(label: str, config: Config, rows: Sequence[Row], verdict: Verdict) -> str:
    """The printed table."""
    lines = [
        f"{label}, {config.quantization}, {config.threads} thread(s) each; prompts of {config.prefix_tokens} "
        f"shared tokens and {config.suffix_tokens} of their own, one at a time; {config.num_requests} after "
        "the first",
        "",
        table(
            ["requests of", "prefix cache", "first TTFT ms", "then p50", "p90", "of the prompt cached"],
            [
                (
                    row.owner,
                    row.mode,
                    "-" if row.first_ttft_s is None else milliseconds(row.first_ttft_s),
                    milliseconds(row.ttft_p50_s),
                    milliseconds(row.ttft_p90_s),
                    f"{row.cached_share:.0%}",
                )
                for row in rows
            ],
        ),
        "",
    ]
    for owner, ratio in verdict.speedup.items():
        verdict_text = (
            "" if owner == _AT_ONCE else f" (goal: {GOAL:g}): {'met' if ratio >= GOAL else 'missed'}"
        )
        lines.append(f"TTFT of {owner}: {ratio:.1f} times shorter with the cache{verdict_text}")
    same = verdict.answers - len(verdict.different)
    lines.append(f"answers with and without the cache: {same} of {verdict.answers} are the same")
    return "\n".join(lines)


def _measure(model: BenchModel, config: Config) -> list[Record]:
    rng = random.Random(config.seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(4, model.vocab_size) for _ in range(count)]

    records = []
    with contextlib.ExitStack() as stack:
        _say("starting a server without and one with the cache")
        clients = {mode: stack.enter_context(_client(model, config, mode)) for mode in MODES}
        for adapter in (None, *model.names):
            owner = adapter or _BASE
            warm, shared = draw(config.prefix_tokens), draw(config.prefix_tokens)
            # Of the lengths to come, with and without a hit, under another prefix.
            for _ in range(3):
                for client in clients.values():
                    _ask(client, warm + draw(config.suffix_tokens), adapter, config.max_tokens)
            for index in range(config.num_requests + 1):
                prompt = shared + draw(config.suffix_tokens)
                for mode, client in clients.items():
                    answer = _ask(client, prompt, adapter, config.max_tokens)
                    records.append(Record(mode, owner, index, *answer))
            _say(f"asked for {owner}")
        shared = draw(config.prefix_tokens)
        prompts = [shared + draw(config.suffix_tokens) for _ in range(config.num_requests)]
        for mode, client in clients.items():
            records += _at_once(client, mode, prompts, config.max_tokens)
    return records


def _at_once(client: Client, mode: str, prompts: Sequence[list[int]], max_tokens: int) -> list[Record]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = pool.map(lambda prompt: _ask(client, prompt, None, max_tokens), prompts)
        return [Record(mode, _AT_ONCE, index, *found) for index, found in enumerate(answers, 1)]


@contextlib.contextmanager
def _client(model: BenchModel, config: Config, mode: str) -> Iterator[Client]:
    length = config.prefix_tokens + config.suffix_tokens + config.max_tokens
    flags = [
        *("--model", str(model.base), "--adapters", str(model.adapters)),
        *("--quantization", config.quantization),
        *("--threads", str(config.threads), "--max-model-len", str(length + 1)),
        *("--kv-block-size", str(_BLOCK), "--prefix-cache", mode),
        *("--port", "0", "--metrics-port", "-1"),
    ]
    with LaunchedServer(flags) as server, Client(server.grpc, retry=None) as client:
        yield client


class _Answer(NamedTuple):
    """Seconds to the first token and in all, prompt tokens and those of them that were cached, the answer."""

    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    tokens: tuple[int, ...]


def _ask(client: Client, prompt: list[int], adapter: str | None, max_tokens: int) -> _Answer:
    tokens: list[int] = []
    first_s, usage = 0.0, None
    started = time.perf_counter()
    with client.stream(prompt, adapter=adapter, max_tokens=max_tokens, ignore_eos=True) as stream:
        for chunk in stream:
            if chunk.token_ids and not tokens:
                first_s = time.perf_counter() - started
            tokens += chunk.token_ids
            usage = chunk.usage or usage
    total_s = time.perf_counter() - started
    assert usage is not None
    return _Answer(first_s, total_s, usage.prompt_tokens, usage.cached_prompt_tokens, tuple(tokens))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
