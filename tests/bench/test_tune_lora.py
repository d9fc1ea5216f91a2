"""The search for the fastest variants, against costs made up so that the best is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from loraplex_bench import tune_lora
from loraplex_bench.ops import lora_cases
from loraplex_bench.ops.lora_cases import ModelShape, activations
from loraplex_bench.ops.timers import Sample
from loraplex_kernels.lora import tiles
from loraplex_kernels.lora.tiles import LoraTiles
from loraplex_kernels.pool import tile_rows


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_the_search_finds_the_best_of_every_group(family: tiles.Family) -> None:
    start = tiles.BUILT_IN[family, "half"]
    groups = tune_lora.GROUPS[family]
    wanted = {key: value for group in groups for key, value in group.choices[-1].items()}

    def score(config: LoraTiles) -> float:
        return 1e-5 * (1 + sum(getattr(config, key) != value for key, value in wanted.items()))

    found = tune_lora.search(start, groups, score, math.inf, quiet)
    assert {key: getattr(found, key) for key in wanted} == wanted
    assert found.rows == start.rows
    assert found.dot_columns <= found.expand_columns


def test_noise_changes_nothing() -> None:
    start = tiles.BUILT_IN["decode", "half"]
    found = tune_lora.search(
        start, tune_lora.GROUPS["decode"], lambda config: 1.0 if config == start else 0.995, math.inf, quiet
    )
    assert found == start


def test_a_variant_that_cannot_run_is_not_chosen() -> None:
    start = tiles.BUILT_IN["prefill", "half"]
    tried: list[LoraTiles] = []

    def score(config: LoraTiles) -> float:
        tried.append(config)
        return 1.0 if config == start else math.inf

    assert tune_lora.search(start, tune_lora.GROUPS["prefill"], score, math.inf, quiet) == start
    assert len(tried) == len({dataclasses.astuple(config) for config in tried}), "a variant was timed twice"


def test_the_time_limit_keeps_what_was_found() -> None:
    start = tiles.BUILT_IN["decode", "half"]
    assert tune_lora.search(start, tune_lora.GROUPS["decode"], lambda _: 1.0, -1, quiet) == start


def test_the_scorer_checks_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, with a clock made up: right results are timed, wrong ones left out."""
    monkeypatch.setitem(lora_cases.MODELS, "tiny", ModelShape(64, 32, 96, 1))
    monkeypatch.setattr(tune_lora, "sample_graph", lambda calls, repeats: Sample(500.0, 500.0))
    layers = lora_cases.make_layers("tiny", "8", 2, torch.float32, torch.device("cpu"))
    said: list[str] = []
    score = tune_lora.scorer(layers, "decode", "single", said.append)
    config = tiles.BUILT_IN["decode", "single"]
    assert 0 < score(config) < 1e-3
    assert not said

    def wrong(self: Any, x: torch.Tensor, y: torch.Tensor, *rest: object) -> None:
        y += 1

    monkeypatch.setattr(tune_lora.OwnKernels, "apply", wrong)
    assert score(config) == math.inf
    assert "wrong results" in said[0]


@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_batches_are_of_their_family(family: tiles.Family) -> None:
    for tokens, mix in tune_lora.BATCHES[family]:
        adapters = lora_cases.adapters_of_tokens(mix, tokens)
        assert tiles.family(tile_rows(tokens, len(set(adapters))), tokens) == family
        assert activations(ModelShape(8, 8, 8, 1), tokens, torch.float32, torch.device("cpu"))
