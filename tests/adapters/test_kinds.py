"""The tables of kinds and settings: all of PEFT's are in them, and what they call served is parsed."""

from __future__ import annotations

import dataclasses

import peft
import pytest

from loraplex_server.adapters.spec.kinds import OTHER_PEFT_TYPES, PEFT_SETTINGS, PEFT_TYPES
from loraplex_server.adapters.spec.peft_config import _METHODS


def test_every_type_of_peft_is_in_the_table() -> None:
    assert {kind.value for kind in peft.PeftType} <= {*PEFT_TYPES, *OTHER_PEFT_TYPES}
    assert not PEFT_TYPES.keys() & {*OTHER_PEFT_TYPES}


def test_what_the_table_calls_served_is_parsed() -> None:
    assert [name for name, kind in PEFT_TYPES.items() if kind.served] == [*_METHODS]


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig,
        peft.IA3Config,
        peft.PromptTuningConfig,
        peft.PromptEncoderConfig,
        peft.PrefixTuningConfig,
        peft.LNTuningConfig,
        peft.TrainableTokensConfig,
    ],
)
def test_every_setting_of_a_served_type_is_in_the_table(config: type) -> None:
    missing = {field.name for field in dataclasses.fields(config)} - PEFT_SETTINGS.keys()
    assert not missing
