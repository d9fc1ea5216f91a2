"""Plain data of the engine: plans in one buffer, draws from seed and position, messages on the wire."""

from __future__ import annotations

import dataclasses
import statistics

import msgspec
import numpy as np
import pytest

from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.composition import Composition
from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.core.random import uniform
from loraplex_server.core.request import (
    AdapterUse,
    FinishReason,
    Request,
    SamplingParams,
)
from loraplex_server.core.request_rules import RequestLimits, check_request
from loraplex_server.core.step import StepPlan
from loraplex_server.wire import commands, frames, messages


def _plan() -> StepPlan:
    lengths = {field.name: index for index, field in enumerate(dataclasses.fields(StepPlan))}
    rng = np.random.default_rng(0)
    floats = {field.name for field in dataclasses.fields(StepPlan) if field.type == "Floats"}
    assert {"pair_weight", "temperature", "top_p", "uniform"} <= floats
    return StepPlan(
        **{
            name: rng.random(length) if name in floats else rng.integers(-(2**62), 2**62, length)
            for name, length in lengths.items()
        }
    )


def test_a_plan_survives_its_buffer() -> None:
    plan = _plan()
    copy = StepPlan.from_bytes(plan.to_bytes())
    for field in dataclasses.fields(StepPlan):
        before, after = getattr(plan, field.name), getattr(copy, field.name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_cut_buffer_is_refused() -> None:
    buffer = _plan().to_bytes()
    for size in (0, 8, len(buffer) - 8):
        with pytest.raises(ValueError, match="not a step plan"):
            StepPlan.from_bytes(buffer[:size])


def test_draws_are_uniform_and_reproducible() -> None:
    draws = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    assert abs(statistics.mean(draws) - 0.5) < 0.01
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert counts.min() > 400
    # Neighbours in either direction are unrelated.
    grid = np.array(draws).reshape(100, 100) - 0.5
    for one, other in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs((one * other).mean()) < 0.005
    assert uniform(7, 3) == uniform(7, 3)
    assert 0 <= uniform(2**64 - 1, 2**31) < 1


def test_messages_survive_the_wire() -> None:
    request = Request(
        "r",
        (1, 2),
        SamplingParams(temperature=0.5, stop_token_ids=(3,), logprobs=2),
        (AdapterUse("sql", 0.5),),
        deadline_s=12.5,
    )
    submit = messages.Submit(request)
    assert frames.decode_to_engine(frames.encode(submit)[4:]) == submit
    delta = messages.TokenDelta(
        "r",
        (5,),
        (messages.TokenLogprobs(5, -0.5, (messages.TopLogprob(5, -0.5),)),),
        finish=FinishReason.LENGTH,
        times=messages.Times(0.1, 0.0, 0.2, 0.3, 1),
    )
    tokens = messages.Tokens((delta,))
    frame = frames.encode(tokens)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert frames.decode_from_engine(frame[4:]) == tokens


def test_commands_and_answers_survive_the_wire() -> None:
    status = AdapterStatus("a", "/a", "host", False, "LORA", 6, ("q_proj",), 9, "", 0, False, 1, 2, 3)
    recipe = Composition("ties", (AdapterUse("a"), AdapterUse("b", 0.5)), density=0.5)
    for command in (
        commands.LoadAdapter("a", "/a", inplace=True),
        commands.ComposeAdapter("c", recipe),
        commands.AdoptAdapter("u", "/staged", {"adapter_config.json": "00"}),
        commands.UnloadAdapter("a", 2.5),
        commands.ListAdapters(),
        commands.GetAdapter("a"),
        commands.PinAdapter("a", False),
        commands.PrefetchAdapters(("a", "b"), to_device=False),
        commands.GetChatTemplate("a"),
        commands.CheckIntegrity(),
    ):
        call = commands.Call(3, command)
        assert frames.decode_to_engine(frames.encode(call)[4:]) == call
    report = commands.IntegrityReport(("bad",), 1, 2, 3, 4, "ab")
    for answer in (status, (status, status), (), "", "{{ x }}", report):
        reply = commands.Reply(3, answer)
        assert frames.decode_from_engine(frames.encode(reply)[4:]) == reply
    failed = commands.Reply(3, error=InvalidArgumentError.field("name", "is bad").info)
    assert frames.decode_from_engine(frames.encode(failed)[4:]) == failed


def test_a_request_keeps_to_the_limits_whoever_made_it() -> None:
    limits = RequestLimits(vocab_size=100, max_model_len=4, max_adapters=2)
    check_request(Request("r", (1, 2, 3), adapters=(AdapterUse("a"), AdapterUse("b"))), limits)
    for request, field, said in (
        (Request("r", ()), "prompt", "is empty"),
        (Request("r", (1, 2, 3, 4)), "prompt", "has 4 tokens"),
        (Request("r", (1, -1)), "prompt", "outside the vocabulary of 100"),
        (Request("r", (1,), adapters=tuple(map(AdapterUse, "abc"))), "adapters", "3 are more than the 2"),
        (Request("r", (1,), adapters=(AdapterUse("a"), AdapterUse("a", 0.5))), "adapters", "named twice"),
    ):
        with pytest.raises(InvalidArgumentError, match=said) as caught:
            check_request(request, limits)
        assert [violation.field for violation in caught.value.info.violations] == [field]


def test_what_is_no_message_is_refused() -> None:
    for body in (b"", b"\x00", msgspec.msgpack.encode({"type": "Nonsense"})):
        with pytest.raises(msgspec.DecodeError):
            frames.decode_to_engine(body)
