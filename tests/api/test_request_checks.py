"""Validation of messages, and what they become."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from loraplex.v1 import adapters_pb2, generation_pb2
from loraplex_server.api.requests.check import check_generate, check_prompt_tokens
from loraplex_server.api.requests.check_adapters import check_composition, check_load
from loraplex_server.api.requests.limits import Limits
from loraplex_server.api.requests.to_core import Circumstances, to_composition
from loraplex_server.api.requests.to_core import to_request as convert_request
from loraplex_server.core.composition import COMBINATION_TYPES, Composition, prunes
from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.core.request import AdapterUse, SamplingDefaults, SamplingParams, Structure
from loraplex_server.core.request_rules import RequestLimits

LIMITS = Limits(RequestLimits(vocab_size=100, max_model_len=32, max_adapters=3), max_prompt_chars=64)
OK: dict[str, Any] = {"text": "hello"}


def use(name: str, weight: float | None = None) -> generation_pb2.AdapterWeight:
    return generation_pb2.AdapterWeight(adapter=name, weight=weight)


def sampling(**fields: Any) -> dict[str, Any]:
    return OK | {"sampling": generation_pb2.SamplingParams(**fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return OK | {"stopping": generation_pb2.StoppingCriteria(**fields)}


def structure(**fields: Any) -> dict[str, Any]:
    return OK | {"structure": generation_pb2.Structure(**fields)}


def ids(*values: int) -> dict[str, Any]:
    return {"token_ids": generation_pb2.TokenIds(ids=values)}


BAD = [
    ({}, "prompt"),
    ({"text": ""}, "text"),
    ({"text": "x" * 65}, "text"),
    (ids(), "token_ids.ids"),
    (ids(*[1] * 32), "token_ids.ids"),
    (ids(1, 100), "token_ids.ids[1]"),
    (OK | {"adapters": [use("a/b")]}, "adapters[0].adapter"),
    (OK | {"adapters": [use("")]}, "adapters[0].adapter"),
    (OK | {"adapters": [use("x" * 129)]}, "adapters[0].adapter"),
    (OK | {"adapters": [use("sql\n")]}, "adapters[0].adapter"),
    (OK | {"adapters": [use("a"), use("b"), use("a")]}, "adapters[2].adapter"),
    (OK | {"adapters": [use("a"), use("b"), use("c"), use("d")]}, "adapters"),
    (OK | {"adapters": [use("a"), use("b", float("nan"))]}, "adapters[1].weight"),
    (OK | {"adapters": [use("a", float("-inf"))]}, "adapters[0].weight"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=float("nan")), "sampling.temperature"),
    (sampling(temperature=float("inf")), "sampling.temperature"),
    (sampling(top_p=0.0), "sampling.top_p"),
    (sampling(top_p=1.01), "sampling.top_p"),
    (sampling(top_p=float("nan")), "sampling.top_p"),
    (stopping(max_tokens=0), "stopping.max_tokens"),
    (OK | {"prompt_logprobs": 21}, "prompt_logprobs"),
    (OK | {"n": 0}, "n"),
    (OK | {"n": 129}, "n"),
    (stopping(max_tokens=3, min_tokens=4), "stopping.min_tokens"),
    (stopping(stop=["a", ""]), "stopping.stop[1]"),
    (stopping(stop=["x" * 257]), "stopping.stop[0]"),
    (stopping(stop=["x"] * 17), "stopping.stop"),
    (stopping(stop_token_ids=[1, 100]), "stopping.stop_token_ids[1]"),
    (stopping(stop_token_ids=[1] * 65), "stopping.stop_token_ids"),
    (structure(), "structure"),
    (structure(json_schema=""), "structure.json_schema"),
    (structure(json_schema="{"), "structure.json_schema"),
    (structure(json_schema="[]"), "structure.json_schema"),
    (structure(json_schema="[" * 100_000), "structure.json_schema"),
    (structure(json_schema='"' + "x" * (256 << 10) + '"'), "structure.json_schema"),
    (structure(regex=""), "structure.regex"),
    (structure(regex="é" * (129 << 10)), "structure.regex"),
    (structure(grammar=""), "structure.grammar"),
    (structure(choice=generation_pb2.Choice()), "structure.choice.texts"),
    (structure(choice=generation_pb2.Choice(texts=["a", ""])), "structure.choice.texts"),
    (structure(choice=generation_pb2.Choice(texts=["a"] * 1025)), "structure.choice.texts"),
    (structure(choice=generation_pb2.Choice(texts=["a" * 1000] * 300)), "structure.choice.texts"),
    (OK | {"logprobs": 21}, "logprobs"),
    (OK | {"speculative_tokens": 17}, "speculative_tokens"),
    (OK | {"request_id": "two words"}, "request_id"),
    (OK | {"request_id": ""}, "request_id"),
]


@pytest.mark.parametrize(
    ("fields", "path"), BAD, ids=[f"{index}-{path}" for index, (_, path) in enumerate(BAD)]
)
def test_a_bad_field_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_generate(generation_pb2.GenerateRequest(**fields), LIMITS)
    assert [violation.field for violation in caught.value.info.violations] == [path]
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "x" * 64},
        ids(*[99] * 31),
        OK | {"adapters": [use("A.b_c-9"), use("x" * 128, -2.5), use("z", 0.0)]},
        sampling(temperature=0.0, top_p=1.0, top_k=2**32 - 1, seed=0),
        stopping(max_tokens=1, min_tokens=1, stop=["x" * 256] * 16, stop_token_ids=[99] * 64),
        stopping(min_tokens=1000),
        OK | {"prompt_logprobs": 20, "n": 128} | stopping(max_tokens=0),
        stopping(max_tokens=0) | {"echo": True},
        OK | {"logprobs": 20, "request_id": "a" * 128, "priority": -(2**31), "speculative_tokens": 16},
    ],
)
def test_the_edges_of_what_is_allowed(fields: dict[str, Any]) -> None:
    check_generate(generation_pb2.GenerateRequest(**fields), LIMITS)


def test_all_violations_are_found_at_once() -> None:
    message = generation_pb2.GenerateRequest(
        text="",
        logprobs=50,
        sampling=generation_pb2.SamplingParams(top_p=2),
        stopping=generation_pb2.StoppingCriteria(stop=[""]),
    )
    with pytest.raises(InvalidArgumentError) as caught:
        check_generate(message, LIMITS)
    fields = [violation.field for violation in caught.value.info.violations]
    assert fields == ["text", "sampling.top_p", "stopping.stop[0]", "logprobs"]


def to_request(num_prompt_tokens: int = 4, **fields: Any) -> Any:
    message = generation_pb2.GenerateRequest(**(OK | fields))
    check_generate(message, LIMITS)
    check_prompt_tokens(message, range(num_prompt_tokens), LIMITS)
    around = Circumstances(range(num_prompt_tokens), request_id="r", tenant="acme", deadline_s=12.5)
    return convert_request(message, LIMITS, around)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"json_schema": '{"type": "null"}'}, Structure("json_schema", '{"type": "null"}')),
        ({"json_object": generation_pb2.JsonObject()}, Structure("json_object")),
        ({"regex": " "}, Structure("regex", " ")),
        ({"grammar": "start: /a/"}, Structure("grammar", "start: /a/")),
        (
            {"choice": generation_pb2.Choice(texts=["b", "a", "b"])},
            Structure("choice", choices=("b", "a")),
        ),
    ],
)
def test_structures(fields: dict[str, Any], found: Structure) -> None:
    assert to_request(**structure(**fields)).structure == found
    assert to_request().structure is None


def test_defaults() -> None:
    request = to_request()
    assert request.prompt_token_ids == (0, 1, 2, 3)
    assert request.adapters == ()
    assert (request.request_id, request.tenant) == ("r", "acme")
    assert (request.deadline_s, request.priority) == (12.5, 0)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_tokens) == (0.0, 0, 1.0, 0)
    assert sampling.logprobs is None
    assert to_request().sampling.seed != sampling.seed
    assert to_request(logprobs=0).sampling.logprobs == 0
    assert to_request(adapters=[use("a")]).adapters == (AdapterUse("a", 1.0),)
    assert to_request(adapters=[use("a", 0.0)]).adapters == (AdapterUse("a", 0.0),)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "asked", "max_tokens"), [(4, None, 28), (4, 5, 5), (4, 500, 28), (31, None, 1)]
)
def test_max_tokens_is_cut_to_the_room_left(
    num_prompt_tokens: int, asked: int | None, max_tokens: int
) -> None:
    criteria = generation_pb2.StoppingCriteria(max_tokens=asked, min_tokens=min(asked or 400, 400))
    sampling = to_request(num_prompt_tokens, stopping=criteria).sampling
    assert sampling.max_tokens == max_tokens
    assert sampling.min_tokens == min(asked or 400, max_tokens)


@pytest.mark.parametrize("num_prompt_tokens", [0, 32, 33])
def test_a_prompt_without_tokens_or_room_is_refused(num_prompt_tokens: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        to_request(num_prompt_tokens)
    assert [violation.field for violation in caught.value.info.violations] == ["text"]


def test_top_k_of_the_whole_vocabulary_is_none() -> None:
    for top_k, expected in ((99, 99), (100, 0), (2**32 - 1, 0)):
        request = to_request(sampling=generation_pb2.SamplingParams(top_k=top_k))
        assert request.sampling.top_k == expected


@pytest.mark.parametrize(
    ("name", "source", "fields"),
    [
        ("a b", "/x", ["name"]),
        ("", "", ["name", "source"]),
        ("sql", "a\0b", ["source"]),
        ("sql", "x" * 4097, ["source"]),
    ],
)
def test_loading_wants_a_name_and_a_source(name: str, source: str, fields: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_load(adapters_pb2.LoadAdapterRequest(name=name, source=source))
    assert [violation.field for violation in caught.value.info.violations] == fields


def composition_request(**changed: Any) -> adapters_pb2.RegisterCompositionRequest:
    fields: dict[str, Any] = {
        "name": "both",
        "combination_type": adapters_pb2.COMBINATION_TYPE_DARE_TIES,
        "members": [
            adapters_pb2.CompositionMember(adapter="a"),
            adapters_pb2.CompositionMember(adapter="b", weight=-0.3),
        ],
        "density": 0.5,
    }
    return adapters_pb2.RegisterCompositionRequest(**{**fields, **changed})


def test_a_composition_comes_across() -> None:
    assert to_composition(composition_request()) == Composition(
        "dare_ties", (AdapterUse("a", 1.0), AdapterUse("b", -0.3)), density=0.5
    )
    whole = composition_request(
        combination_type=adapters_pb2.COMBINATION_TYPE_DARE_TIES_SVD,
        majority_sign=adapters_pb2.MAJORITY_SIGN_FREQUENCY,
        svd_rank=3,
        seed=9,
    )
    assert to_composition(whole) == Composition(
        "dare_ties_svd",
        (AdapterUse("a", 1.0), AdapterUse("b", -0.3)),
        density=0.5,
        majority_sign="frequency",
        svd_rank=3,
        seed=9,
    )
    kinds = {
        to_composition(
            adapters_pb2.RegisterCompositionRequest(
                name="x",
                combination_type=number,
                members=[adapters_pb2.CompositionMember(adapter="a")],
                **({"density": 0.5} if prunes(name.removeprefix("COMBINATION_TYPE_").lower()) else {}),
            )
        ).combination_type
        for name, number in adapters_pb2.CombinationType.items()
        if number
    }
    assert kinds == set(COMBINATION_TYPES)


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"name": ""}, ["name"]),
        ({"combination_type": 0, "density": None}, ["combination_type"]),
        ({"combination_type": 99, "density": None}, ["combination_type"]),
        ({"members": []}, ["members"]),
        ({"members": [adapters_pb2.CompositionMember(adapter="a")] * 2}, ["members[1].adapter"]),
        (
            {"members": [adapters_pb2.CompositionMember(adapter="a/b", weight=float("nan"))]},
            ["members[0].adapter", "members[0].weight"],
        ),
        ({"density": None}, ["density"]),
        ({"density": 0}, ["density"]),
        ({"density": 1.5}, ["density"]),
        ({"svd_rank": 3}, ["svd_rank"]),
        ({"seed": 1 << 63}, ["seed"]),
        ({"majority_sign": 7}, ["majority_sign"]),
        (
            {
                "combination_type": adapters_pb2.COMBINATION_TYPE_CAT,
                "seed": 1,
                "majority_sign": adapters_pb2.MAJORITY_SIGN_TOTAL,
            },
            ["density", "seed", "majority_sign"],
        ),
    ],
)
def test_every_fault_of_a_composition_is_named(changed: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_composition(composition_request(**changed))
    assert [violation.field for violation in caught.value.info.violations] == fields


def test_what_is_left_open_is_the_model_s_own() -> None:
    own = SamplingDefaults(temperature=0.6, top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    limits = dataclasses.replace(LIMITS, defaults=own)

    def sampling(**fields: Any) -> SamplingParams:
        message = generation_pb2.GenerateRequest(
            **(OK | {"sampling": generation_pb2.SamplingParams(**fields)})
        )
        check_generate(message, limits)
        return convert_request(message, limits, Circumstances(range(4), request_id="r", tenant="t")).sampling

    found = sampling()
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.6, 50, 0.9, 0.1)
    assert found.repetition_penalty == 1.1
    found = sampling(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0, 0, 1, 0)
    assert found.repetition_penalty == 1
    assert sampling(repetition_penalty=0.01).repetition_penalty == pytest.approx(0.01)
    found = sampling(presence_penalty=1.5, frequency_penalty=-0.5, logit_bias={3: -1.5})
    assert (found.presence_penalty, found.frequency_penalty) == (1.5, -0.5)
    assert found.logit_bias == ((3, -1.5),)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"min_p": 1.01}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 3e-43}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {100: 1.0}}, "logit_bias[0]"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias"),
        ({"bad_words": ["ok", " "]}, "bad_words[1]"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
    ],
)
def test_bad_sampling_is_named(fields: dict[str, Any], name: str) -> None:
    message = generation_pb2.GenerateRequest(**(OK | {"sampling": generation_pb2.SamplingParams(**fields)}))
    with pytest.raises(InvalidArgumentError) as caught:
        check_generate(message, LIMITS)
    assert [violation.field for violation in caught.value.info.violations] == [f"sampling.{name}"]
