"""What the engine does while a device computes: the step before's tokens go out, none is late or lost."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
import pytest

from loraplex_server.core.step import StepOutput, StepPlan
from loraplex_server.engine.messages import Failed

PROMPT = range(5, 12)


@dataclasses.dataclass
class Asynchronous:
    """A runner whose `launch` only takes note: all is computed when the result is asked for."""

    runner: Any
    log: list[tuple[str, int]]
    asynchronous: bool = True
    steps: int = 0

    def launch(self, plan: StepPlan) -> Any:
        self.steps += 1
        self.log.append(("launch", self.steps))
        step = self.steps

        class Launched:
            def result(launched) -> StepOutput:  # noqa: N805
                self.log.append(("result", step))
                output: StepOutput = self.runner.run(plan)
                return dataclasses.replace(output, device_s=0.01, waited_s=0.001 * step)

        return Launched()

    def weight_checksum(self) -> Any:
        return self.runner.weight_checksum()


@pytest.fixture
def overlapped(harness: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A harness with such a runner, and the log of what happened in order."""

    def make(**options: Any) -> tuple[Any, list[tuple[str, int]]]:
        served = harness(tiny("Llama"), **options)
        log: list[tuple[str, int]] = []
        engine = served.engine
        monkeypatch.setattr(engine, "_runner", Asynchronous(engine._runner, log))
        collect = engine._emit

        def emit(client: str, message: Any) -> None:
            kind = "failed" if isinstance(message, Failed) else "emit"
            log.append((kind, engine._runner.steps))
            collect(client, message)

        monkeypatch.setattr(engine, "_emit", emit)
        return served, log

    return make


def test_tokens_go_out_while_the_next_step_runs(overlapped: Any) -> None:
    served, log = overlapped()
    served.submit("r", PROMPT, max_tokens=3, ignore_eos=True)
    served.run()
    assert log == [
        ("launch", 1), ("result", 1),
        ("launch", 2), ("emit", 2), ("result", 2),
        ("launch", 3), ("emit", 3), ("result", 3), ("emit", 3),
    ]  # fmt: skip


def test_answers_are_those_of_one_step_at_a_time(overlapped: Any, harness: Any, tiny: Any) -> None:
    scheduler = {"max_num_requests": 3, "max_batch_tokens": 9}
    plain = harness(tiny("Llama"), scheduler=scheduler)
    served, _ = overlapped(scheduler=scheduler)
    for one in (plain, served):
        for index, name in enumerate(("r6", None, "r14", "r7", None)):
            adapters = [] if name is None else [(name, 1.0)]
            one.submit(str(index), range(5 + index, 14), adapters, max_tokens=2 + index, ignore_eos=True)
        one.run()
    answers = [{key: (a.tokens, a.finish) for key, a in one.answers.items()} for one in (plain, served)]
    assert answers[0] == answers[1]


def test_tokens_are_out_before_what_ends_a_request(overlapped: Any) -> None:
    served, log = overlapped()
    late = served.submit("late", PROMPT, max_tokens=50, deadline_s=time.time() + 3600)
    gone = served.submit("gone", PROMPT, max_tokens=50)
    served.engine.step()
    assert late.tokens == gone.tokens == []
    served.engine.cancel("test", "gone")
    assert len(gone.tokens) == 1
    served.engine.step()
    (sequence,) = served.engine.scheduler.running
    sequence.request = msgspec.structs.replace(sequence.request, deadline_s=1.0)
    served.engine.step()
    assert len(late.tokens) == 2
    assert late.error.code == "DEADLINE_EXCEEDED"
    assert log[-2:] == [("emit", 2), ("failed", 2)]
    assert len(gone.tokens) == 1


def test_the_devices_wait_counts_where_there_was_work(overlapped: Any) -> None:
    served, _ = overlapped()
    for name in "ab":
        served.submit(name, PROMPT, max_tokens=2, ignore_eos=True)
        served.run()
    steps = served.engine.stats().steps
    assert [step.device_seconds for step in steps] == [0.01] * 4
    assert [step.idle_seconds for step in steps] == [None, 0.002, None, 0.004]
