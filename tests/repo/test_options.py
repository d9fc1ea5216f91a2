"""An option of sampling is there in every layer, or named here as one that has another name or none."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import msgspec

from loraplex import GenerateOptions
from loraplex.cli.parser import parser
from loraplex.v1 import generation_pb2
from loraplex_server.api.http.schema import CompletionBody
from loraplex_server.core import request, step

# The command's singular, and what it leaves to programs.
COMMAND = {"bad_words": "bad_word"}
NOT_IN_THE_COMMAND = {"logit_bias"}
# What becomes something else in a step: a seed the draws.
STEP = {"seed": "uniform", "logit_bias": "bias_value", "bad_words": "banned_ids"}


def _options() -> set[str]:
    return {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields}


def test_the_engine_knows_it() -> None:
    core = {field.name for field in msgspec.structs.fields(request.SamplingParams)}
    assert _options() <= core


def test_a_step_carries_it() -> None:
    plan = {field.name for field in dataclasses.fields(step.StepPlan)}
    assert {STEP.get(name, name) for name in _options()} <= plan


def test_the_sdk_takes_it() -> None:
    assert _options() <= get_type_hints(GenerateOptions).keys()


def test_the_command_takes_it() -> None:
    taken = vars(parser().parse_args(["generate", "a prompt"]))
    assert {COMMAND.get(name, name) for name in _options() - NOT_IN_THE_COMMAND} <= taken.keys()


def test_http_takes_it() -> None:
    assert _options() <= {field.name for field in msgspec.structs.fields(CompletionBody)}
