"""One step ahead of the device: the next step is launched before the tokens of the last are known."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from loraplex_server.core.step import StepOutput, StepPlan
from loraplex_server.model.run.runner import LaunchTimes, Pending
from loraplex_server.wire.messages import Failed

PROMPT = range(5, 12)


@dataclasses.dataclass
class Device:
    """A runner whose steps are computed in the order of their launch, and known when asked for."""

    runner: Any
    log: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    plans: list[StepPlan] = dataclasses.field(default_factory=list)
    asynchronous: bool = True

    def launch(self, plan: StepPlan) -> Any:
        self.plans.append(plan)
        step = len(self.plans)
        self.log.append(("launch", step))
        assert ("launch", step - 2) not in self.log or ("result", step - 2) in self.log, "one step ahead"
        pending = self.runner.launch(plan)

        class Launched:
            def result(launched) -> StepOutput:  # noqa: N805
                self.log.append(("result", step))
                return dataclasses.replace(pending.result(), device_s=0.01, waited_s=0.001 * step)

        return Launched()

    def weight_checksum(self) -> Any:
        return self.runner.weight_checksum()


@pytest.fixture
def ahead(harness: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Device]]:
    """A harness whose engine has such a device."""

    def make(*arguments: Any, **options: Any) -> tuple[Any, Device]:
        served = harness(tiny("Llama"), *arguments, **options)
        engine = served.engine
        device = Device(engine._runner)
        monkeypatch.setattr(engine, "_runner", device)
        collect = engine._emit

        def emit(client: str, message: Any) -> None:
            device.log.append(("failed" if isinstance(message, Failed) else "emit", len(device.plans)))
            collect(client, message)

        monkeypatch.setattr(engine, "_emit", emit)
        return served, device

    return make


def test_the_next_step_is_launched_before_the_last_is_known(ahead: Any) -> None:
    served, device = ahead()
    served.submit("r", PROMPT, max_tokens=3, ignore_eos=True)
    served.run()
    assert device.log == [
        ("launch", 1),
        ("launch", 2), ("result", 1), ("emit", 2),
        ("launch", 3), ("result", 2), ("emit", 3),
        ("result", 3), ("emit", 3),
    ]  # fmt: skip
    first, *others = device.plans
    assert first.fed_row.tolist() == []
    assert [(plan.fed_row.tolist(), plan.fed_from.tolist()) for plan in others] == [([0], [0])] * 2
    assert [plan.positions.tolist() for plan in others] == [[7], [8]]


def test_answers_are_those_of_one_step_at_a_time(ahead: Any, harness: Any, tiny: Any) -> None:
    """Random traffic, too little memory for all of it, stop tokens, draws, log-probabilities, chunks."""
    preempted = 0
    for seed in range(4):
        rng = random.Random(seed)
        scheduler = {
            "max_num_requests": 4,
            "max_batch_tokens": rng.choice([5, 16]),
            "kv_block_size": 4,
            "kv_cache_bytes": 12 * 2048 if seed % 2 else 0,
            "max_model_len": 40,
        }
        requests = [
            {
                "prompt": [rng.randrange(3, 200) for _ in range(rng.randrange(1, 14))],
                "adapters": rng.choice([[], [("r6", 1.0)], [("r7", 0.5), ("r14", 1.0)]]),
                "max_tokens": rng.randrange(1, 24),
                "temperature": rng.choice([0.0, 1.5]),
                "seed": rng.randrange(100),
                "ignore_eos": rng.random() < 0.5,
                "stop_token_ids": tuple(rng.sample(range(3, 200), 30)),
                "min_tokens": rng.choice([0, 0, 1]),
                "logprobs": rng.choice([None, 2]),
                "prompt_logprobs": (None, 1, None)[number % 3],
                "frequency_penalty": rng.choice([0.0, 0.0, 1.0]),
            }
            for number in range(12)
        ]
        plain = harness(tiny("Llama"), scheduler=scheduler)
        served, device = ahead(scheduler=scheduler)
        answers = []
        for one in (plain, served):
            queue = [dict(request) for request in requests]
            for index, request in enumerate(queue):
                one.submit(str(index), request.pop("prompt"), request.pop("adapters"), **request)
                if index % 3 == 2:
                    one.engine.step()
            one.run()
            one.assert_clean()
            answers.append(
                {
                    name: (a.tokens, a.finish, [p.token_id for p in (*a.prompt_logprobs, *a.logprobs)])
                    for name, a in one.answers.items()
                }
            )
        assert answers[0] == answers[1]
        assert {"stop", "length"} <= {finish for _, finish, _ in answers[0].values()}
        assert sum(len(plan.fed_row) for plan in device.plans) > 20
        preempted += sum(step.preemptions for step in served.engine.stats().steps)
    assert preempted > 0


def test_who_leaves_with_a_step_in_flight_gets_no_more(ahead: Any) -> None:
    served, _ = ahead()
    late = served.submit("late", PROMPT, max_tokens=50, ignore_eos=True, deadline_s=time.time() + 3600)
    gone = served.submit("gone", PROMPT, max_tokens=50, ignore_eos=True)
    served.engine.step()
    served.engine.step()
    assert len(late.tokens) == len(gone.tokens) == 1
    served.engine.cancel("test", "gone")
    again = served.submit("gone", PROMPT, max_tokens=2, ignore_eos=True)
    (sequence,) = (one for one in served.engine.scheduler.running if one.request.request_id == "late")
    sequence.request = msgspec.structs.replace(sequence.request, deadline_s=1.0)
    served.run()
    assert late.error.code == "DEADLINE_EXCEEDED"
    assert (len(late.tokens), len(gone.tokens)) == (1, 1)
    assert len(again.tokens) == 2
    assert again.tokens[0] == gone.tokens[0]


def test_a_bad_word_is_seen_coming(ahead: Any, harness: Any, tiny: Any) -> None:
    """Its beginning has to be known before its end can be banned."""
    plain = harness(tiny("Llama"))
    whole = plain.submit("r", PROMPT, max_tokens=6, ignore_eos=True)
    plain.run()
    word = tuple(whole.tokens[2:4])
    served, _ = ahead()
    for one in (plain, served):
        one.submit("banned", PROMPT, max_tokens=6, ignore_eos=True, bad_words=(word,))
        one.run()
    found = served.answers["banned"].tokens
    assert found == plain.answers["banned"].tokens
    assert found[:3] == whole.tokens[:3]
    assert found[3] != whole.tokens[3]


def test_a_stop_token_ends_a_request_whose_next_step_runs(ahead: Any, harness: Any, tiny: Any) -> None:
    plain = harness(tiny("Llama"))
    whole = plain.submit("r", PROMPT, max_tokens=6, ignore_eos=True)
    plain.run()
    tokens = enumerate(whole.tokens)
    stop = next(token for index, token in tokens if index and token not in whole.tokens[:index])
    served, device = ahead()
    found = served.submit("r", PROMPT, max_tokens=6, ignore_eos=True, stop_token_ids=(stop,))
    served.run()
    assert found.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert found.finish == "stop"
    assert len(device.plans) == len(found.tokens) + 1
    assert device.log[-1] == ("result", len(device.plans)), (
        "what was computed ahead is waited for and dropped"
    )


def test_the_devices_wait_counts_where_there_was_work(ahead: Any) -> None:
    served, _ = ahead()
    for name in "ab":
        served.submit(name, PROMPT, max_tokens=2, ignore_eos=True)
        served.run()
    steps = served.engine.stats().steps
    assert [step.device_seconds for step in steps] == [0.01] * 4
    assert [step.idle_seconds for step in steps] == [None, 0.002, None, 0.004]


def test_on_a_device_the_run_is_by_its_clock_and_the_host_waits_for_the_tokens() -> None:
    class Span:
        def seconds(self) -> tuple[float, float]:
            return 0.25, 0.125

    output = Pending(None, Span(), LaunchTimes(1.0, 2.0, 4.0)).result()
    assert (output.device_s, output.waited_s) == (0.25, 0.125)
    assert (output.prepare_s, output.run_s) == (7.0, 0.25)
    assert output.sample_s is not None
    assert output.sample_s < 4.0
