"""`loraplex bench side-by-side`: loraplex and transformers + PEFT, the same requests, on the same machine,
in one run.

Contenders are loaded side by side, each in a process of its own, and measured in turns, so that whatever
else the machine does falls on all of them. Figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from loraplex import AsyncClient, LoraplexError
from loraplex_bench.demo.tasks import TASKS, data_dir
from loraplex_bench.load.environment import environment
from loraplex_bench.load.launcher import LaunchedServer, LaunchError
from loraplex_bench.load.results import table, write_json
from loraplex_bench.peers.contender import Contender, ContenderError
from loraplex_bench.peers.jobs import MAX_BATCH_TOKENS, PEFT_WEIGHTS, Answered, BenchModel, Job

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
QUANTIZATIONS = ("none", "int4", "nf4")
SERVER_QUANTIZATIONS = ("none", "int4")
"""Those of them that are also measured as a server."""

GOAL_ONE_BY_ONE = 8.0
GOAL_PADDED = 2.0
GOAL_SERVER = 0.8
GOAL_ADAPTERS = 0.8


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Attributes:
        turn_seconds: a turn passes over the requests again and again until it has taken this long.
        case_seconds: a case gets no further turn once its turns have taken this long; each gets one.
    """

    models: tuple[str, ...] = ("demo", "100m")
    threads: tuple[int, ...] = (1, 2)
    quantizations: tuple[str, ...] = QUANTIZATIONS
    num_requests: int = 32
    num_adapters: int = 16
    prompt_tokens: int = 64
    max_tokens: int = 32
    repeats: int = 3
    turn_seconds: float = 2.0
    case_seconds: float = 120.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        system: "peft (a)", "peft (b)", "engine" or "server".
        weights: "fp32", "bnb-nf4", or loraplex's quantization.
        adapters: whether every request had an adapter; else all asked the base.
        tokens_per_s: of each turn, in order.
    """

    model: str
    threads: int
    system: str
    weights: str
    adapters: bool
    tokens_per_s: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)


@dataclasses.dataclass(frozen=True)
class Goal:
    """A ratio of two rows' medians, and what it should reach."""

    model: str
    threads: int
    text: str
    ratio: float
    goal: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal


@dataclasses.dataclass(frozen=True)
class Agreement:
    """PEFT's tokens against the engine's on the same fp32 weights.

    Attributes:
        equal: jobs whose tokens are all the same, of `jobs`.
        differing_from_base: jobs whose adapter changes PEFT's own answer; without that, equality would
            prove little.
        ties: of the others, jobs whose first difference is where PEFT's two largest logits lie closer
            together than twice the error allowed between the two (1e-4 of the largest logit).
    """

    model: str
    threads: int
    jobs: int
    equal: int
    ties: int
    differing_from_base: int

    @property
    def holds(self) -> bool:
        return self.equal + self.ties == self.jobs and self.differing_from_base * 2 >= self.jobs


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that a run found."""

    config: BenchConfig
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...]
    agreements: tuple[Agreement, ...]
    left_out: tuple[str, ...]


@dataclasses.dataclass
class _Case:
    """A case while it is measured; `answer` keeps the tokens of the first turn."""

    system: str
    weights: str
    adapters: bool
    run: Callable[[int], Answered]
    turns: list[float] = dataclasses.field(default_factory=list)
    spent_s: float = 0.0
    answer: Answered | None = None


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
    parser.add_argument(
        "--num-requests", type=int, default=default.num_requests, metavar="N", help="default: 32"
    )
    parser.add_argument(
        "--num-adapters", type=int, default=default.num_adapters, metavar="N", help="default: 16"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=default.prompt_tokens, metavar="N", help="default: 64"
    )
    parser.add_argument("--max-tokens", type=int, default=default.max_tokens, metavar="N", help="default: 32")
    parser.add_argument(
        "--repeats", type=int, default=default.repeats, metavar="N", help="turns (default: 3)"
    )
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
    config = BenchConfig(
        models=tuple(args.models),
        threads=tuple(args.threads),
        quantizations=tuple(dict.fromkeys(("none", *args.quantizations))),
        num_requests=args.num_requests,
        num_adapters=args.num_adapters,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        repeats=args.repeats,
        turn_seconds=args.turn_seconds,
        case_seconds=args.case_seconds,
        seed=args.seed,
    )
    try:
        comparison = compare(config)
    except (ContenderError, LaunchError, LoraplexError, OSError, ValueError) as error:
        print(f"loraplex bench side-by-side: {error}", file=sys.stderr)
        return 2
    text = render(comparison)
    print(text)
    stem = f"side-by-side-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M}"
    document = {"kind": "side-by-side", "environment": environment(), "result": comparison}
    write_json(args.output / f"{stem}.json", document)
    (args.output / f"{stem}.txt").write_text(text + "\n")
    print(f"\nwritten: {args.output / stem}.json and .txt")
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
                with _contenders(model, threads, config.quantizations, mixed, left_out) as (cases, dense):
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


def find_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """The ratios that matter among `rows`, each with its goal; those whose rows are there."""
    found = {(row.model, row.threads, row.system, row.weights, row.adapters): row.median for row in rows}
    for model, threads in dict.fromkeys((row.model, row.threads) for row in rows):

        def rate(system: str, weights: str, adapters: bool = True) -> float | None:
            return found.get((model, threads, system, weights, adapters))  # noqa: B023 (used in this turn only)

        for quantization in QUANTIZATIONS:
            engine = rate("engine", quantization)
            if engine is None:
                continue
            pairs = [
                *(
                    (
                        f"engine {quantization} / PEFT {weights} {letter}",
                        rate(f"peft {letter}", weights),
                        goal,
                    )
                    for weights in ("fp32", "bnb-nf4")
                    if weights == "fp32" or quantization != "none"
                    for letter, goal in (("(a)", GOAL_ONE_BY_ONE), ("(b)", GOAL_PADDED))
                ),
                (
                    f"engine {quantization}: adapters / all base",
                    rate("engine", quantization, False),
                    GOAL_ADAPTERS,
                ),
            ]
            for text, other, goal in pairs:
                if other is not None:
                    yield Goal(model, threads, text, engine / other, goal)
            server = rate("server", quantization)
            if server is not None:
                yield Goal(model, threads, f"server / engine, {quantization}", server / engine, GOAL_SERVER)


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

        _say(f"making the random model {name!r}")
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


@contextlib.contextmanager
def _contenders(
    model: BenchModel, threads: int, quantizations: Sequence[str], mixed: Sequence[Job], left_out: list[str]
) -> Iterator[tuple[list[_Case], Contender]]:
    """Starts all contenders; yields their cases, and PEFT on fp32."""
    base_jobs = [Job(job.prompt, None) for job in mixed]
    cases: list[_Case] = []
    with contextlib.ExitStack() as stack:

        def add(
            system: str, weights: str, jobs: Sequence[Job], run: Callable[[Sequence[Job], int], Answered]
        ) -> None:
            with_adapters = any(job.adapter is not None for job in jobs)
            cases.append(_Case(system, weights, with_adapters, lambda tokens: run(jobs, tokens)))

        def start(spec: dict[str, str]) -> Contender:
            contender = Contender(model, spec, threads)
            stack.callback(contender.close)
            return contender

        # They load at the same time; nothing is measured before the last is ready.
        _say(f"loading everything on {model.label}, {threads} threads")
        peers = {weights: start({"kind": "peft", "weights": weights}) for weights in PEFT_WEIGHTS}
        engines = {
            quantization: start(
                {"kind": "engine", "quantization": quantization, "dtype": _dtype(quantization)}
            )
            for quantization in quantizations
        }
        for weights, peer in list(peers.items()):
            try:
                peer.wait_ready()
                peer.run("one_by_one", mixed[:1], 1)
            except ContenderError as error:
                if weights == "dense":
                    raise
                last_line = str(error).strip().splitlines()[-1]
                left_out.append(f"PEFT on {weights}, {model.label}, {threads} threads: {last_line}")
                continue
            label = "fp32" if weights == "dense" else weights
            add("peft (a)", label, mixed, _how(peer, "one_by_one"))
            add("peft (b)", label, mixed, _how(peer, "padded"))
            add("peft (b)", label, base_jobs, _how(peer, "padded"))
        for quantization, engine in engines.items():
            engine.wait_ready()
            add("engine", quantization, mixed, _how(engine, "answer"))
            add("engine", quantization, base_jobs, _how(engine, "answer"))
        for quantization in [name for name in SERVER_QUANTIZATIONS if name in quantizations]:
            server = stack.enter_context(_Server(model, quantization, threads))
            add("server", quantization, mixed, server.answer)
            add("server", quantization, base_jobs, server.answer)
        yield cases, peers["dense"]


class _Server:
    """A loraplex server as a contender, asked through the SDK over gRPC from this process."""

    def __init__(self, model: BenchModel, quantization: str, threads: int) -> None:
        flags = [
            *("--model", str(model.base), "--adapters", str(model.adapters), "--quantization", quantization),
            *("--dtype", _dtype(quantization), "--threads", str(threads), "--max-model-len", "512"),
            *("--max-batch-tokens", str(MAX_BATCH_TOKENS), "--prefix-cache", "off"),
            *("--port", "0", "--metrics-port", "0"),
        ]
        self._server = LaunchedServer(flags)
        self._runner = asyncio.Runner()
        self._client = AsyncClient(self._server.grpc, retry=None)

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        self._server.stop()

    def answer(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        """All jobs at once, each a stream of its own."""
        return self._runner.run(self._answer(jobs, max_tokens))

    async def _answer(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        async def one(job: Job) -> list[int]:
            tokens: list[int] = []
            async for chunk in self._client.stream(
                list(job.prompt), adapter=job.adapter, max_tokens=max_tokens, ignore_eos=True
            ):
                tokens.extend(chunk.token_ids)
            return tokens

        started = time.perf_counter()
        answers = await asyncio.gather(*(one(job) for job in jobs))
        return Answered(time.perf_counter() - started, list(answers))


def _measure(what: str, cases: Sequence[_Case], config: BenchConfig) -> None:
    """Warms every case up, then measures them in turns."""
    for number, case in enumerate(cases, start=1):
        _say(f"{what}: warming up {number}/{len(cases)}: {case.system} {case.weights}")
        # One request at a time has met every shape after a few tokens; a batch changes until its end.
        case.run(min(4, config.max_tokens) if case.system == "peft (a)" else config.max_tokens)
    for turn in range(config.repeats):
        for case in cases:
            if turn and case.spent_s + case.spent_s / len(case.turns) > config.case_seconds:
                continue
            rate = _turn(case, config)
            who = "adapters" if case.adapters else "all base"
            _say(
                f"{what}: turn {turn + 1}/{config.repeats}: {case.system} {case.weights}, {who}: "
                f"{rate:.1f} tokens/s"
            )


def _turn(case: _Case, config: BenchConfig) -> float:
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
    model: BenchModel, threads: int, jobs: Sequence[Job], cases: Sequence[_Case], dense: Contender
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


def _how(contender: Contender, method: str) -> Callable[[Sequence[Job], int], Answered]:
    return lambda jobs, max_tokens: contender.run(method, jobs, max_tokens)


def _dtype(quantization: str) -> str:
    """fp32 where tokens are compared with PEFT's; elsewhere what the server would choose."""
    return "float32" if quantization == "none" else "auto"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
