"""`loraplex bench side-by-side`: loraplex and transformers + PEFT, the same requests, on the same machine,
in one run.

Contenders are loaded side by side, each in a process of its own, and measured in turns, so that whatever
else the machine does falls on all of them. Figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loraplex import LoraplexError
from loraplex_bench.demo.tasks import TASKS, data_dir
from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchError
from loraplex_bench.load.options import add_count, settings_of
from loraplex_bench.load.results import table, write_result
from loraplex_bench.peers.contender import Contender, ContenderError
from loraplex_bench.peers.jobs import BenchModel, Job
from loraplex_bench.scenarios.side_by_side.contenders import Case, contenders, say
from loraplex_bench.scenarios.side_by_side.results import (
    QUANTIZATIONS,
    Agreement,
    BenchConfig,
    Comparison,
    Row,
    find_goals,
)

DESCRIPTION = """\
Measures generated tokens per second of loraplex, in process and as a server over gRPC, against transformers +
PEFT run as fast as it goes: (a) one request at a time with set_adapter, (b) one padded batch with
adapter_names. Same requests, same weights, same number of threads, KV cache on, inference mode, warmed up, in
one run. Where both run on the same fp32 weights, their tokens are compared as well.
"""

EXAMPLES = """\
examples:
  loraplex bench side-by-side
      the demo model and a random Llama of about 100 M parameters, one and two threads: takes a while
  loraplex bench side-by-side --models demo --threads 1 --repeats 5
      only the demo model, on one thread, five turns
  loraplex bench side-by-side --models small --num-requests 8 --max-tokens 4 --repeats 1
      a quick try of everything on a tiny random model
"""

MODELS = ("demo", "100m", "small")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `loraplex bench side-by-side`."""
    default = BenchConfig()
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(default.models),
        help="demo, 100m (a random Llama of about 100 M parameters), small (default: demo 100m)",
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, default=list(default.threads), metavar="N", help="default: 1 2"
    )
    parser.add_argument(
        "--quantizations",
        nargs="+",
        choices=QUANTIZATIONS,
        default=list(default.quantizations),
        metavar="Q",
        help="of loraplex, beside none (default: none int4 nf4)",
    )
    add_count(parser, "--num-requests", default.num_requests, "requests of a pass")
    add_count(parser, "--num-adapters", default.num_adapters, "adapters that the requests have in turn")
    add_count(parser, "--prompt-tokens", default.prompt_tokens, "of each request")
    add_count(parser, "--max-tokens", default.max_tokens, "generated for each request")
    add_count(parser, "--repeats", default.repeats, "turns")
    parser.add_argument(
        "--turn-seconds",
        type=float,
        default=default.turn_seconds,
        metavar="S",
        help="a turn repeats the requests until it has taken this long (default: %(default)g)",
    )
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=default.case_seconds,
        metavar="S",
        help="a slow case gets no further turn once it has taken this long (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help="for table and JSON (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes. The exit code is 1 if tokens disagree; goals are told, not enforced."""
    config = settings_of(
        BenchConfig,
        args,
        models=tuple(args.models),
        threads=tuple(args.threads),
        quantizations=tuple(dict.fromkeys(("none", *args.quantizations))),
    )
    try:
        comparison = compare(config)
    except (ContenderError, LaunchError, LoraplexError, OSError, ValueError) as error:
        print(f"loraplex bench side-by-side: {error}", file=sys.stderr)
        return 2
    text = render(comparison)
    print(text)
    document = {"kind": "side-by-side", "environment": environment(), "result": comparison}
    print(f"\nwritten: {write_result(args.output, 'side-by-side', text, document)}.json and .txt")
    return 0 if all(agreement.holds for agreement in comparison.agreements) else 1


def compare(config: BenchConfig) -> Comparison:
    """Runs every contender on every model with every number of threads.

    Raises:
        ContenderError, LaunchError: loraplex, or PEFT on fp32, could not be run.
        ValueError: the demo model has fewer adapters than wanted.
    """
    rows: list[Row] = []
    agreements: list[Agreement] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        for name in config.models:
            model = _model(name, Path(folder, name), config)
            mixed = make_jobs(model, config)
            for threads in config.threads:
                with contenders(model, threads, config.quantizations, mixed, left_out) as (cases, dense):
                    _measure(f"{model.label}, {threads} threads", cases, config)
                    rows += [
                        Row(model.label, threads, c.system, c.weights, c.adapters, tuple(c.turns))
                        for c in cases
                    ]
                    agreements.append(_agreement(model, threads, mixed, cases, dense))
    return Comparison(config, tuple(rows), tuple(find_goals(rows)), tuple(agreements), tuple(left_out))


def make_jobs(model: BenchModel, config: BenchConfig) -> list[Job]:
    """Random prompts, the adapters in turn."""
    rng = random.Random(config.seed)
    return [
        Job(
            tuple(rng.randrange(4, model.vocab_size) for _ in range(config.prompt_tokens)),
            model.names[index % len(model.names)],
        )
        for index in range(config.num_requests)
    ]


def render(comparison: Comparison) -> str:
    """Rows, ratios beside their goals, and how far the tokens agree."""
    config = comparison.config
    blocks = [
        f"{config.num_requests} requests over {config.num_adapters} adapters, {config.prompt_tokens} prompt "
        f"+ {config.max_tokens} generated tokens each; generated tokens per second, median of up to "
        f"{config.repeats} turns",
        table(
            ["model", "threads", "system", "weights", "requests", "tokens/s", "least", "most", "turns"],
            [
                [
                    row.model,
                    row.threads,
                    row.system,
                    row.weights,
                    "adapters" if row.adapters else "all base",
                    f"{row.median:.1f}",
                    f"{min(row.tokens_per_s):.1f}",
                    f"{max(row.tokens_per_s):.1f}",
                    len(row.tokens_per_s),
                ]
                for row in comparison.rows
            ],
        ),
        table(
            ["model", "threads", "ratio", "is", "goal", ""],
            [
                [
                    g.model,
                    g.threads,
                    g.text,
                    f"{g.ratio:.2f}",
                    f">= {g.goal:g}",
                    "met" if g.met else "NOT MET",
                ]
                for g in comparison.goals
            ],
        ),
        table(
            ["tokens of PEFT fp32 and engine none", "threads", "equal", "ties", "adapter changes answer", ""],
            [
                [
                    a.model,
                    a.threads,
                    f"{a.equal}/{a.jobs}",
                    a.ties,
                    f"{a.differing_from_base}/{a.jobs}",
                    "ok" if a.holds else "DISAGREE",
                ]
                for a in comparison.agreements
            ],
        ),
    ]
    if comparison.left_out:
        blocks.append("\n".join(["left out:", *(f"  {text}" for text in comparison.left_out)]))
    return "\n\n".join(blocks)


def _model(name: str, folder: Path, config: BenchConfig) -> BenchModel:
    if name != "demo":
        from loraplex_bench.models.random_llama import make_random_llama

        say(f"making the random model {name!r}")
        return make_random_llama(
            folder, adapters=config.num_adapters, seed=config.seed, small=name == "small"
        )
    from transformers import AutoConfig

    adapters = data_dir() / "adapters"
    names = tuple(task for task in TASKS if (adapters / task / "adapter_config.json").is_file())
    if len(names) < config.num_adapters:
        raise ValueError(f"num_adapters: the demo model has {len(names)}, not {config.num_adapters}")
    base = data_dir() / "base"
    vocab_size = AutoConfig.from_pretrained(base).vocab_size
    return BenchModel("demo", base, adapters, names[: config.num_adapters], vocab_size)


def _measure(what: str, cases: Sequence[Case], config: BenchConfig) -> None:
    """Warms every case up, then measures them in turns."""
    for number, case in enumerate(cases, start=1):
        say(f"{what}: warming up {number}/{len(cases)}: {case.system} {case.weights}")
        # One request at a time has met every shape after a few tokens; a batch changes until its end.
        case.run(min(4, config.max_tokens) if case.system == "peft (a)" else config.max_tokens)
    for turn in range(config.repeats):
        for case in cases:
            if turn and case.spent_s + case.spent_s / len(case.turns) > config.case_seconds:
                continue
            rate = _turn(case, config)
            who = "adapters" if case.adapters else "all base"
            say(
                f"{what}: turn {turn + 1}/{config.repeats}: {case.system} {case.weights}, {who}: "
                f"{rate:.1f} tokens/s"
            )


def _turn(case: Case, config: BenchConfig) -> float:
    """Passes over the requests until the turn is long enough; its tokens per second."""
    seconds, tokens = 0.0, 0
    while not tokens or seconds < config.turn_seconds:
        answer = case.run(config.max_tokens)
        case.answer = case.answer or answer
        seconds += answer.seconds
        tokens += sum(map(len, answer.token_ids))
    case.turns.append(tokens / seconds)
    case.spent_s += seconds
    return case.turns[-1]


def _agreement(
    model: BenchModel, threads: int, jobs: Sequence[Job], cases: Sequence[Case], dense: Contender
) -> Agreement:
    def tokens(system: str, weights: str, adapters: bool) -> list[list[int]]:
        case = next(c for c in cases if (c.system, c.weights, c.adapters) == (system, weights, adapters))
        assert case.answer is not None
        return case.answer.token_ids

    peft, base = tokens("peft (a)", "fp32", True), tokens("peft (b)", "fp32", False)
    equal = ties = 0
    for job, theirs, ours in zip(jobs, peft, tokens("engine", "none", True), strict=True):
        if theirs == ours:
            equal += 1
            continue
        first = next(i for i, (left, right) in enumerate(zip(theirs, ours, strict=True)) if left != right)
        gap, largest = dense.margin(job, theirs[:first])
        ties += gap <= 2e-4 * largest
    changed = sum(left != right for left, right in zip(peft, base, strict=True))
    return Agreement(model.label, threads, len(jobs), equal, ties, changed)
