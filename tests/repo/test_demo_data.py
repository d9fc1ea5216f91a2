"""The shipped demo model is the one on record, and answers as the record says. About 20 seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loraplex_bench.demo.tasks import (
    MAX_LINE_LENGTH,
    MIN_LINE_LENGTH,
    TASKS,
    answers_differ,
    data_dir,
    draw_line,
    expected,
    make_lines,
    sure_lines,
)

check = pytest.importorskip("demo_training.check", reason="needs the dev extra: peft")
adapter_training = pytest.importorskip("demo_training.adapter_training", reason="needs the dev extra: peft")
leaks = pytest.importorskip("demo_training.leaks", reason="needs the dev extra: peft")
record = pytest.importorskip("demo_training.record", reason="needs the dev extra: peft")

pytestmark = pytest.mark.slow

DATA = data_dir()
TRAINING = json.loads((DATA / "TRAINING.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["nf4", "int4"])
def served(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Tokenizer, and the dequantised base with every adapter attached."""
    model = check.load_with_adapters(DATA / "base", DATA / "adapters", list(TASKS), request.param)
    return check.load_tokenizer(DATA / "base"), model


def test_lines_are_seeded_and_cover_every_length() -> None:
    lines = make_lines(7, 1000)
    assert lines == make_lines(7, 1000)
    assert lines != make_lines(8, 1000)
    assert {len(line) for line in lines} == set(range(MIN_LINE_LENGTH, MAX_LINE_LENGTH + 1))


def test_right_answers_differ_pairwise_and_keep_the_length() -> None:
    for line in make_lines(9, 2000):
        answers = [expected(name, line) for name in (None, *TASKS)]
        assert len(set(answers)) == len(answers), line
        assert {len(answer) for answer in answers} == {len(line)}


def test_a_length_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        draw_line(random.Random(1), MAX_LINE_LENGTH + 1)


def test_weights_are_those_on_record() -> None:
    assert record.weights_hashes(DATA) == TRAINING["sha256"]


def test_recorded_answers_are_exact_enough() -> None:
    entries = {"base": TRAINING["base"], **TRAINING["adapters"]}
    assert set(entries) == {"base", *TASKS}
    assert TRAINING["check"]["lines"] >= 500
    for name, entry in entries.items():
        assert set(entry["exact"]) == {"none", "nf4", "int4"}
        assert min(entry["exact"].values()) >= 0.99, name


@pytest.mark.parametrize("name", list(TASKS))
def test_adapter_has_the_shape_it_was_planned_with(name: str) -> None:
    spec = adapter_training.ADAPTERS[name]
    config = json.loads((DATA / "adapters" / name / "adapter_config.json").read_text())
    assert config["r"] == spec.rank
    assert config["lora_alpha"] == spec.alpha
    assert config["use_rslora"] == spec.use_rslora
    assert set(config["target_modules"]) == set(spec.target_modules)
    assert config["base_model_name_or_path"] == "loraplex-demo"


def test_tokenizer_takes_a_text_apart_and_puts_it_together() -> None:
    tokenizer = check.load_tokenizer(DATA / "base")
    text = "Two  words, 3 digits: 417!\nand a line"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", [None, *TASKS])
def test_answers_are_exact_on_the_dequantised_base(served: tuple[Any, Any], name: str | None) -> None:
    tokenizer, model = served
    lines = [line for line in sure_lines() if len(line) in (MIN_LINE_LENGTH, 17, MAX_LINE_LENGTH)][:24]
    assert len(lines) == 24
    assert check.wrong_answers(model, tokenizer, name, lines) == []


@pytest.mark.parametrize("name", ["upper", "title", "rot13"])
def test_an_adapter_on_half_of_a_request_gives_itself_away(served: tuple[Any, Any], name: str) -> None:
    tokenizer, model = served
    unnoticed = leaks.unnoticed_leaks(model, tokenizer, name, [None, "caesar1"], 10)
    assert max(unnoticed.values()) <= 0.6


def test_sure_lines_are_distinct_demo_lines() -> None:
    lines = sure_lines()
    assert len(set(lines)) == len(lines) >= 1000
    assert {len(line) for line in lines} == set(range(MIN_LINE_LENGTH, MAX_LINE_LENGTH + 1))
    assert all(answers_differ(line) for line in lines)
