"""An engine in the test's own thread, and what it answered."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from loraplex_server.config import AdapterConfig, EngineConfig, ModelConfig, SchedulerConfig
from loraplex_server.core.request import AdapterUse, Request, SamplingParams, Structure
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.drafts import Drafter
from loraplex_server.engine.engine import Engine
from loraplex_server.wire.messages import Failed, Times, TokenLogprobs, Tokens


@dataclasses.dataclass
class Answer:
    """The result of one request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish: str | None = None
    error: Any = None
    times: Times | None = None


class Harness:
    """Submits to an engine and collects what it emits."""

    def __init__(self, config: EngineConfig) -> None:
        self.answers: dict[str, Answer] = {}
        self.engine: Engine = build_engine(config, self._collect, progress=False)

    def _collect(self, client: str, message: Tokens | Failed) -> None:
        if isinstance(message, Failed):
            self.answers[message.request_id].error = message.error
            return
        for delta in message.deltas:
            answer = self.answers[delta.request_id]
            assert answer.finish is None
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs
            answer.prompt_logprobs += delta.prompt_logprobs
            if delta.finish is not None:
                answer.finish, answer.times = delta.finish.value, delta.times

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        adapters: Sequence[tuple[str, float]] = (),
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        tenant: str = "default",
        cache_prefix: bool = True,
        group: str = "",
        structure: Structure | None = None,
        speculative_tokens: int | None = None,
        **sampling: Any,
    ) -> Answer:
        self.answers[name] = Answer()
        uses = tuple(AdapterUse(adapter, weight) for adapter, weight in adapters)
        self.engine.submit(
            "test",
            Request(
                name,
                tuple(prompt),
                SamplingParams(**sampling),
                uses,
                tenant,
                priority,
                deadline_s,
                cache_prefix,
                group,
                structure=structure,
                speculative_tokens=speculative_tokens,
            ),
        )
        return self.answers[name]

    def run(self, limit_s: float = 60.0) -> None:
        """Steps until nothing is left to do."""
        end_s = time.monotonic() + limit_s
        while self.engine.has_work:
            assert time.monotonic() < end_s, "the engine did not finish in time"
            if not self.engine.step():
                self.engine.adapters.wait_event(0.05)

    def assert_clean(self) -> None:
        """Nothing is held, nothing is broken."""
        report = self.engine.check_integrity()
        assert report.problems == ()
        assert (report.running, report.waiting, report.kv_blocks_used, report.adapter_references) == (
            0,
            0,
            0,
            0,
        )


MakeHarness = Callable[..., Harness]


@contextmanager
def _harnesses() -> Iterator[MakeHarness]:
    made: list[Harness] = []

    def make(
        tiny_model: Any,
        quantization: str = "none",
        *,
        scheduler: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
    ) -> Harness:
        on_gpu = torch.cuda.is_available()
        config = EngineConfig(
            ModelConfig(
                str(tiny_model.base),
                quantization=quantization,
                **{"dtype": "float32", "threads": 1, **(model or {})},
            ),
            # On a GPU the cache of one engine would take what the next one needs.
            SchedulerConfig(**{**({"kv_cache_bytes": 32 << 20} if on_gpu else {}), **(scheduler or {})}),
            AdapterConfig(**{"folders": (tiny_model.adapters,), "device_bytes": 4 << 20, **(adapters or {})}),
        )
        made.append(Harness(config))
        return made[-1]

    yield make
    for one in made:
        one.assert_clean()
        one.engine.adapters.close()


@pytest.fixture
def harness() -> Iterator[MakeHarness]:
    """`harness(tiny_model, quantization=…, scheduler={…}, adapters={…}, model={…})`; checked at the end."""
    with _harnesses() as make:
        yield make


@pytest.fixture(scope="module")
def module_harness() -> Iterator[MakeHarness]:
    """The same for engines that several tests look at."""
    with _harnesses() as make:
        yield make


class _KnowingDrafter(Drafter):
    """Knows the answer, and now and then says something else."""

    def __init__(self, answer: Sequence[int], num_prompt: int, limit: int, rng: random.Random) -> None:
        super().__init__(4, limit)
        self._answer, self._num_prompt, self._end, self._rng = answer, num_prompt, limit, rng

    def due(self, length: int) -> bool:
        return length + 1 < self._end

    def propose(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        rng, done = self._rng, len(token_ids) - self._num_prompt
        count = min(most, rng.randint(0, 4), self._end - len(token_ids) - 1)
        draft = list(self._answer[done : done + max(count, 0)])
        if draft and rng.random() < 0.5:
            draft[rng.randrange(len(draft))] = rng.randrange(3, 200)
        return tuple(draft)


@pytest.fixture(scope="session")
def draft_from() -> Callable[[Harness, Callable[[str], Sequence[int]]], None]:
    """`draft_from(harness, answer)`: who speculates is given, often enough, tokens that are right, and often
    enough such that are not; `answer` gives a request's by its name.
    """

    def change(served: Harness, answer: Callable[[str], Sequence[int]]) -> None:
        rng, original = random.Random(0), served.engine._admission.drafter

        def make(sequence: Any, *, ahead: bool) -> Drafter | None:
            if original(sequence, ahead=ahead) is None:
                return None
            request = sequence.request
            limit = min(sequence.num_prompt + request.sampling.max_tokens, served.engine.info.max_model_len)
            return _KnowingDrafter(answer(request.request_id), sequence.num_prompt, limit, rng)

        served.engine._admission.drafter = make

    return change


@dataclasses.dataclass
class ParityCell:
    """A test's findings for a cell of the parity matrix; the outcome is the test's."""

    worst: float = 0.0

    def error(self, value: float) -> None:
        """Notes an error of the logits, as a share of the largest."""
        self.worst = max(self.worst, value)


@pytest.fixture
def parity_cell(request: pytest.FixtureRequest) -> Callable[[str, str, str], ParityCell]:
    """`parity_cell(table, row, column)` makes this test a cell of the matrix that ends the run."""
    cell = ParityCell()

    def place(table: str, row: str, column: str) -> ParityCell:
        request.node.user_properties.append((_MATRIX, {"place": (table, row, column), "cell": cell}))
        return cell

    return place


_MATRIX = "parity matrix"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The cell's value as it is when the test has ended, in plain data that a worker process can send."""
    report = yield
    report.user_properties = [
        (name, (*value["place"], value["cell"].worst) if name == _MATRIX else value)
        for name, value in report.user_properties
    ]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints kind x column with what came out: the error of the logits where the test passed."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == _MATRIX and (report.when == "call" or outcome != "passed"):
                    table, row, column, worst = value
                    shown = f"{worst:.0e}" if outcome == "passed" else outcome.upper()
                    tables.setdefault(table, {}).setdefault(row, {})[column] = shown
    for table, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        width = max(map(len, rows)) + 2
        terminalreporter.write_sep("-", f"parity with transformers + PEFT: {table}, level (i)")
        terminalreporter.write_line(
            "A number is a pass: greedy tokens are equal, and this is the largest error of a\n"
            "log-probability, as a share of the largest logit. Blank: not run."
        )
        terminalreporter.write_line(" " * width + "".join(f"{column:>17}" for column in columns))
        for row, cells in rows.items():
            line = "".join(f"{cells.get(column, ''):>17}" for column in columns)
            terminalreporter.write_line(f"{row:<{width}}{line}")
