"""The requests of a load run: every request, its arrival and its adapters, drawn from one seed.

The workload is open-loop: arrival times are fixed beforehand, so a slow server does not slow the arrivals
down and so hide its own queue.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

from loraplex_bench.demo.tasks import MAX_ANSWER_TOKENS, iter_lines, prompt, sure_lines

BASE = "base"
"""The name of a request without an adapter in tables."""

ADAPTER_CHOICES = ("zipf", "uniform", "round-robin", "single", "none")
"""Ways to choose the adapter of each request."""


@dataclasses.dataclass(frozen=True)
class LengthRange:
    """Lengths in tokens, drawn uniformly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(
                f"{self.low}:{self.high} is no range of lengths; write LOW:HIGH with 1 <= LOW <= HIGH"
            )

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        """From "64" or "32:128". Raises `ValueError` for anything else."""
        low, _, high = text.partition(":")
        return cls(int(low), int(high or low))

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class PlannedRequest:
    """One request of a workload.

    Attributes:
        at_s: when it arrives, in seconds after the start of the run.
        adapters: (name, weight) of each; empty for the base model.
        prompt: text, or token ids that are taken as they are.
        line: the demo line that is asked about, where the answer can be checked; None elsewhere.
    """

    index: int
    at_s: float
    adapters: tuple[tuple[str, float], ...]
    prompt: str | tuple[int, ...]
    max_tokens: int
    ignore_eos: bool = False
    line: str | None = None

    @property
    def label(self) -> str:
        """The adapters as tables show them: "base", "rot13", "0.7*rot13+0.3*leet"."""
        return adapters_label(self.adapters)

    @property
    def task(self) -> str | None:
        """The demo task whose answer is right: that of the one adapter with weight, None for the base.

        An adapter called `rot13.00042` does what `rot13` does.

        Raises:
            ValueError: a mixture of adapters, which has no answer known beforehand.
        """
        active = [name for name, weight in self.adapters if weight != 0]
        if len(active) > 1 or any(weight not in (0, 1) for _, weight in self.adapters):
            raise ValueError(f"{self.label}: a mixture has no answer known beforehand")
        return active[0].partition(".")[0] if active else None


@dataclasses.dataclass(frozen=True)
class WorkloadConfig:
    """Settings that a workload is drawn by.

    Attributes:
        num_requests: at least 1.
        seed: the same seed and settings give the same workload, on every machine.
        rate: mean arrivals per second; infinity makes all arrive at once.
        burstiness: shape of the gamma-distributed gaps: 1 is Poisson, less is burstier (the gaps'
            coefficient of variation is 1 / sqrt(burstiness)).
        adapters: candidates, the most popular first.
        adapter_choice: one of `ADAPTER_CHOICES`; "zipf" gives the adapter of rank k a share proportional to
            k ** -zipf.
        base_fraction: part of the requests that go to the base model whatever `adapter_choice` says.
        composition_fraction: part of the requests that name two adapters, with weights that sum to 1.
        max_tokens: None takes what the prompts need.
    """

    num_requests: int
    seed: int = 0
    rate: float = math.inf
    burstiness: float = 1.0
    adapters: tuple[str, ...] = ()
    adapter_choice: str = "zipf"
    zipf: float = 1.0
    base_fraction: float = 0.0
    composition_fraction: float = 0.0
    max_tokens: LengthRange | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.num_requests >= 1, "num_requests", self.num_requests, "at least 1")
        _require(self.rate > 0, "rate", self.rate, "above 0, or inf for all at once")
        _require(0 < self.burstiness < math.inf, "burstiness", self.burstiness, "above 0")
        _require(self.zipf >= 0, "zipf", self.zipf, "0 or more")
        _require(0 <= self.base_fraction <= 1, "base_fraction", self.base_fraction, "within 0..1")
        _require(
            0 <= self.composition_fraction <= 1,
            "composition_fraction",
            self.composition_fraction,
            "within 0..1",
        )
        choices = ", ".join(ADAPTER_CHOICES)
        _require(
            self.adapter_choice in ADAPTER_CHOICES, "adapter_choice", self.adapter_choice, f"one of {choices}"
        )
        _require(
            not self.composition_fraction or len(self.adapters) > 1,
            "composition_fraction",
            self.composition_fraction,
            "0 unless there are two adapters",
        )


PromptSource = Callable[[random.Random], tuple[str | tuple[int, ...], str | None]]
"""Draws one prompt, and the demo line that it asks about where it does."""


def demo_prompts(seed: int) -> PromptSource:
    """Lines of the demo model, whose answers can be checked."""
    lines = iter_lines(seed)

    def draw(_: random.Random) -> tuple[str, str]:
        line = next(lines)
        return prompt(line), line

    return draw


def sure_prompts() -> PromptSource:
    """Lines on which the demo model is sure: there, a wrong answer is the server's fault."""
    lines = sure_lines()

    def draw(rng: random.Random) -> tuple[str, str]:
        line = rng.choice(lines)
        return prompt(line), line

    return draw


def random_prompts(lengths: LengthRange, vocab_size: int) -> PromptSource:
    """Random token ids, for any model."""

    def draw(rng: random.Random) -> tuple[tuple[int, ...], None]:
        return tuple(rng.randrange(vocab_size) for _ in range(lengths.draw(rng))), None

    return draw


def text_prompts(texts: Sequence[str]) -> PromptSource:
    """Given texts, in random order."""
    if not texts:
        raise ValueError("prompts: there is none")
    return lambda rng: (rng.choice(texts), None)


def make_workload(config: WorkloadConfig, prompts: PromptSource) -> list[PlannedRequest]:
    """All requests, by arrival.

    Arrivals, adapters and prompts come from generators of their own, so changing one leaves the others as
    they were.
    """
    arrivals = _arrivals(config)
    choose = _adapter_chooser(config)
    texts, lengths = random.Random(f"prompts {config.seed}"), random.Random(f"lengths {config.seed}")
    requests = []
    for index, at_s in enumerate(arrivals):
        adapters = choose(index)
        text, line = prompts(texts)
        if config.max_tokens is not None:
            max_tokens = config.max_tokens.draw(lengths)
        else:
            max_tokens = MAX_ANSWER_TOKENS if line is not None else 128
        requests.append(PlannedRequest(index, at_s, adapters, text, max_tokens, config.ignore_eos, line))
    return requests


def adapters_label(adapters: Sequence[tuple[str, float]]) -> str:
    """ "base", "rot13", or "0.7*rot13+0.3*leet"."""
    if not adapters:
        return BASE
    return "+".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in adapters)


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Shares of `count` ranks, proportional to rank ** -exponent, summing to 1."""
    raw = [(rank + 1) ** -exponent for rank in range(count)]
    total = sum(raw)
    return [weight / total for weight in raw]


def _arrivals(config: WorkloadConfig) -> list[float]:
    if math.isinf(config.rate):
        return [0.0] * config.num_requests
    rng = random.Random(f"arrivals {config.seed}")
    now, times = 0.0, []
    for _ in range(config.num_requests):
        times.append(now)
        now += rng.gammavariate(config.burstiness, 1 / (config.rate * config.burstiness))
    return times


def _adapter_chooser(config: WorkloadConfig) -> Callable[[int], tuple[tuple[str, float], ...]]:
    names = config.adapters
    if config.adapter_choice == "none" or not names:
        return lambda _: ()
    rng = random.Random(f"adapters {config.seed}")
    exponent = config.zipf if config.adapter_choice == "zipf" else 0.0
    shares = zipf_weights(len(names), exponent)

    def one(index: int) -> str:
        match config.adapter_choice:
            case "single":
                return names[0]
            case "round-robin":
                return names[index % len(names)]
            case _:
                return rng.choices(names, shares)[0]

    def choose(index: int) -> tuple[tuple[str, float], ...]:
        kind = rng.random()
        if kind < config.base_fraction:
            return ()
        first = one(index)
        if kind < config.base_fraction + (1 - config.base_fraction) * config.composition_fraction:
            second = rng.choice([name for name in names if name != first])
            weight = round(rng.uniform(0.1, 0.9), 2)
            return (first, weight), (second, round(1 - weight, 2))
        return ((first, 1.0),)

    return choose


def _require(condition: bool, field: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{field}: {value} is not {wanted}")
