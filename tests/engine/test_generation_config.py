"""Defaults of sampling from a checkpoint's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from loraplex_server.config import ModelConfig
from loraplex_server.core.request import SamplingDefaults
from loraplex_server.model.load.generation_config import sampling_defaults


def read(folder: Path, config: Any, **fields: Any) -> SamplingDefaults:
    (folder / "config.json").write_text("{}")
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "generation_config.json").write_text(text)
    return sampling_defaults(ModelConfig(str(folder), **fields))


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, min_p=0.02
    ).save_pretrained(tmp_path)
    found = sampling_defaults(ModelConfig(str(tmp_path)))
    assert found == SamplingDefaults(0.6, 20, 0.9, 0.02, 1.05)
    assert sampling_defaults(ModelConfig(str(tmp_path), generation_config="none")) == SamplingDefaults()


def test_a_greedy_model_stays_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}).temperature == 0
    assert read(tmp_path, {"eos_token_id": [1, 2]}) == SamplingDefaults()


@pytest.mark.parametrize(
    "config",
    ["", "[]", "{", {"temperature": "warm"}, {"do_sample": True, "temperature": -1, "top_p": 7, "min_p": -1}],
)
def test_nonsense_is_as_good_as_nothing(tmp_path: Path, config: Any) -> None:
    found = read(tmp_path, config)
    assert found in (SamplingDefaults(), SamplingDefaults(temperature=1.0))


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert sampling_defaults(ModelConfig(str(tmp_path))) == SamplingDefaults()


@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", 0.005), ("repetition_penalty", 200), ("top_p", 0)]
)
def test_a_value_that_no_request_may_have_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float
) -> None:
    """Else each request that leaves it open would be refused for what it did not say."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, name: value}))
    assert sampling_defaults(ModelConfig(str(tmp_path))) == SamplingDefaults(temperature=1.0)
    assert name in caplog.text
