"""The engine beyond parity: seeds, limits, cancellation, refusals, and many adapters in few slots."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

PROMPT = [5, 17, 60, 121, 9]


def test_two_hundred_requests_over_twelve_adapters_in_three_slots(
    tiny: Any, oracle: Any, harness: Any, adapter_names: list[str], tmp_path: Any
) -> None:
    """Every request completes and is right, though no more than three adapters are ever there at once."""
    # Twelve names over the eight trained ones: a name is an adapter of its own.
    folder = tmp_path / "adapters"
    folder.mkdir()
    contents = {f"tenant{index}": adapter_names[index % len(adapter_names)] for index in range(12)}
    for name, source in contents.items():
        target = folder / name
        target.mkdir()
        for file in (tiny("Llama").adapters / source).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    served = harness(
        tiny("Llama"),
        "nf4",
        scheduler={"max_num_requests": 16, "max_batch_tokens": 64, "max_adapter_wait_s": 0.05},
        adapters={"folders": (folder,), "max_on_device": 3},
    )
    rng = random.Random(0)
    judge = oracle("Llama", "nf4")
    prompts = [tuple(rng.randrange(3, 211) for _ in range(rng.randint(3, 12))) for _ in range(5)]
    truth: dict[tuple[str, int], list[int]] = {}
    asked = []
    for index in range(200):
        name, prompt = rng.choice(list(contents)), rng.randrange(len(prompts))
        asked.append((f"q{index}", name, prompt))
        served.submit(f"q{index}", prompts[prompt], [(name, 1.0)], max_tokens=6, ignore_eos=True)
        if index % 4 == 3:
            served.engine.step()
    served.run()
    for request, name, prompt in asked:
        key = contents[name], prompt
        if key not in truth:
            truth[key] = judge.generate(prompts[prompt], [(contents[name], 1.0)], 6)[0]
        assert served.answers[request].tokens == truth[key], f"{request}: {name} answered otherwise"
    stats = served.engine.stats()
    assert max(step.adapters for step in stats.steps) <= 3
    assert sum(swap.kind == "evict_device" for swap in stats.swaps) >= 9


def test_a_step_says_where_its_time_went(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"))
    served.submit("a", PROMPT, [("r6", 1.0)], max_tokens=3, ignore_eos=True)
    served.run()
    steps = served.engine.stats().steps
    assert len(steps) == 3
    for step in steps:
        parts = [
            step.plan_seconds,
            step.prepare_seconds,
            step.run_seconds,
            step.sample_seconds,
            step.emit_seconds,
        ]
        assert all(seconds > 0 for seconds in parts)
        # They do not overlap, and lie within the step; the slack is for rounding.
        assert sum(parts) <= step.seconds + 1e-6


def test_a_seed_fixes_the_answer_whatever_else_runs(tiny: Any, harness: Any) -> None:
    """The same seed alone, in a crowd, in chunks, and across a preemption; another seed answers otherwise."""
    sampling = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_tokens": 16, "ignore_eos": True}
    alone = harness(tiny("Llama"))
    first = alone.submit("a", PROMPT, [("r6", 1.0)], seed=11, **sampling)
    alone.run()
    other = alone.submit("b", PROMPT, [("r6", 1.0)], seed=12, **sampling)
    alone.run()
    assert first.tokens != other.tokens
    # 12 blocks of 4 tokens, three requests of 21: at least one is preempted.
    crowd = harness(
        tiny("Llama"),
        scheduler={"kv_block_size": 4, "kv_cache_bytes": 12 * 2 * 2 * 2 * 4 * 16 * 4, "max_batch_tokens": 3},
    )
    for index in range(2):
        crowd.submit(f"x{index}", PROMPT, [("r16", 1.0)], seed=index, **sampling)
    again = crowd.submit("a", PROMPT, [("r6", 1.0)], seed=11, **sampling)
    crowd.run()
    assert again.tokens == first.tokens
    assert sum(step.preemptions for step in crowd.engine.stats().steps) > 0


def test_ends_of_generation(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"))
    free = served.submit("free", PROMPT, max_tokens=10, ignore_eos=True)
    served.run()
    assert (free.finish, len(free.tokens)) == ("length", 10)
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    stopped = served.submit("stop", PROMPT, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,))
    late = served.submit(
        "late", PROMPT, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,), min_tokens=10
    )
    limit = served.engine.info.max_model_len
    long = served.submit("long", [7] * (limit - 3), max_tokens=100, ignore_eos=True)
    served.run()
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish == "stop"
    assert stop not in late.tokens
    assert (late.finish, len(late.tokens)) == ("length", 10)
    assert (long.finish, len(long.tokens)) == ("length", 3)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "seed": 3}, {"logprobs": 2}])
def test_logits_that_are_not_finite_end_their_own_request(
    settings: dict[str, Any], tiny: Any, harness: Any
) -> None:
    served = harness(tiny("Llama"))
    keeps = {"max_tokens": 6, "ignore_eos": True, **settings}
    names = [None, "r6", "r8"]
    uses = {str(name): [] if name is None else [(name, 1.0)] for name in names}
    alone = {name: served.submit(f"alone {name}", PROMPT, use, **keeps) for name, use in uses.items()}
    served.run()
    beside = {name: served.submit(f"beside {name}", PROMPT, use, **keeps) for name, use in uses.items()}
    broken = served.submit("broken", PROMPT, [("r6", 1e38)], **keeps)
    # Another way to have no next token.
    banned = served.submit("banned", PROMPT, bad_words=tuple((token,) for token in range(211)), **keeps)
    served.run()
    assert broken.error.code == banned.error.code == "FAILED_PRECONDITION"
    assert "not finite" in broken.error.message
    assert {name: answer.tokens for name, answer in beside.items()} == {
        name: answer.tokens for name, answer in alone.items()
    }
    assert all(len(answer.tokens) == 6 for answer in beside.values())
    served.assert_clean()


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"prompt": []}, "INVALID_ARGUMENT", "prompt"),
        ({"prompt": [211]}, "INVALID_ARGUMENT", "prompt"),
        ({"prompt": [5] * 128}, "INVALID_ARGUMENT", "prompt"),
        ({"adapters": [("r6", 1.0), ("r6", 0.5)]}, "INVALID_ARGUMENT", "adapters"),
        ({"adapters": [(f"r{index}", 1.0) for index in range(9)]}, "INVALID_ARGUMENT", "adapters"),
        ({"adapters": [("nobody", 1.0)]}, "NOT_FOUND", None),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_rest_goes_on(
    change: dict[str, Any], code: str, field: str | None, tiny: Any, harness: Any
) -> None:
    served = harness(tiny("Llama"))
    good = served.submit("good", PROMPT, max_tokens=3, ignore_eos=True)
    bad = served.submit("bad", **{"prompt": PROMPT, **change})
    assert bad.error.code == code
    assert [violation.field for violation in bad.error.violations] == ([field] if field else [])
    served.run()
    assert len(good.tokens) == 3


def test_a_full_queue_says_when_to_come_back(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"), scheduler={"max_queue": 2})
    answers = [served.submit(f"q{index}", PROMPT, max_tokens=2, ignore_eos=True) for index in range(3)]
    assert [answer.error and answer.error.code for answer in answers] == [None, None, "RESOURCE_EXHAUSTED"]
    assert answers[2].error.retry_after_s > 0
    served.run()
    assert all(len(answer.tokens) == 2 for answer in answers[:2])


def test_cancelled_and_expired_requests_hold_nothing_after_one_step(
    tiny: Any, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = harness(tiny("Llama"))
    keeps = {"max_tokens": 100, "ignore_eos": True}
    running = served.submit("running", PROMPT, [("r6", 1.0)], **keeps)
    deadline_s = time.time() + 60
    expiring = served.submit("expiring", PROMPT, [("r8", 1.0)], deadline_s=deadline_s, **keeps)
    while not (running.tokens and expiring.tokens):
        if not served.engine.step():
            served.engine.adapters.wait_event(0.05)
    served.submit("waiting", PROMPT, [("r12", 1.0)], **keeps)
    for name in ("running", "waiting"):
        served.engine.cancel("test", name)
    monkeypatch.setattr(time, "time", lambda: deadline_s + 1)
    served.engine.step()
    assert expiring.error.code == "DEADLINE_EXCEEDED"
    served.assert_clean()
    assert not served.engine.has_work


def test_a_client_that_is_gone_takes_its_requests_along(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"))
    for index in range(3):
        served.submit(f"q{index}", PROMPT, [("r6", 1.0)], max_tokens=100, ignore_eos=True)
    served.engine.step()
    served.engine.cancel_client("somebody else")
    assert served.engine.has_work
    served.engine.cancel_client("test")
    served.assert_clean()


@pytest.mark.slow
def test_the_audit_notices_a_changed_weight(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"), "nf4")
    group = served.engine._runner._base.groups[0]
    packed = group.weights[0].tensors()["packed"]

    def audit() -> None:
        end_s = time.monotonic() + 20
        before = served.engine.stats().audits
        served.submit(f"work{before}", PROMPT, max_tokens=1)
        served.run()
        while served.engine.stats().audits == before:
            assert time.monotonic() < end_s
            if not served.engine.idle():
                time.sleep(0.02)

    audit()
    assert served.engine.stats().weights_ok
    packed[0] ^= 1
    audit()
    stats = served.engine.stats()
    packed[0] ^= 1
    assert not stats.weights_ok
    assert stats.integrity_problems == 0
