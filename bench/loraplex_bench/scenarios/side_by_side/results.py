"""Settings and findings of a comparison, and the goals of its ratios."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

QUANTIZATIONS = ("none", "int4", "nf4")

GOAL_ONE_BY_ONE = 8.0
GOAL_PADDED = 2.0
GOAL_SERVER = 0.8
GOAL_ADAPTERS = 0.8


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Settings of a run.

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
