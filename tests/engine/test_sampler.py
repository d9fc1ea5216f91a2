"""Sampling: greedy, filters, the one draw a token has, masks and log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_server.core.random import uniform
from loraplex_server.core.step import StepPlan
from loraplex_server.model.sampler import sample


def plan(rows: int, **columns: Any) -> StepPlan:
    """A plan of which only the sampling columns matter; scalars are repeated."""
    defaults: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "uniform": 0.5,
        "num_logprobs": -1,
        "banned_start": [0] * (rows + 1),
        "banned_ids": [],
    }
    found: dict[str, Any] = {field.name: np.zeros(0, np.int64) for field in dataclasses.fields(StepPlan)}
    for name, value in (defaults | columns).items():
        kind = np.float64 if name in ("temperature", "top_p", "uniform") else np.int64
        values = np.asarray(value, kind)
        found[name] = np.full(rows, value, kind) if values.ndim == 0 else values
    return StepPlan(**found)


def tokens(logits: torch.Tensor, **columns: Any) -> list[int]:
    return [found.token_id for found in sample(logits, plan(len(logits), **columns))]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 2


def test_greedy_takes_the_best(logits: torch.Tensor) -> None:
    assert tokens(logits) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draws_follow_the_distribution(dtype: torch.dtype) -> None:
    """100,000 draws against softmax(logits / temperature), by a chi-square bound."""
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5], dtype=dtype)
    draws = np.array([uniform(5, position) for position in range(100_000)])
    found = tokens(row.expand(len(draws), -1), temperature=0.7, uniform=draws)
    expected = (row.double() / 0.7).softmax(dim=-1).numpy() * len(draws)
    counts = np.bincount(found, minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 25


def test_top_k_and_top_p_keep_what_they_say(logits: torch.Tensor) -> None:
    draws = np.linspace(0, 1 - 1e-9, len(logits))
    order = logits.argsort(dim=-1, descending=True)
    rank = {row: order[row].tolist().index for row in range(len(logits))}
    found = tokens(logits, temperature=1.0, top_k=3, uniform=draws)
    assert max(rank[row](token) for row, token in enumerate(found)) == 2
    found = tokens(logits, temperature=1.0, top_p=0.6, uniform=draws)
    mass = logits.double().softmax(dim=-1)
    for row, token in enumerate(found):
        before = mass[row, order[row, : rank[row](token)]].sum()
        assert before < 0.6
    assert tokens(logits, temperature=5.0, top_p=1e-9, uniform=draws) == logits.argmax(dim=-1).tolist()
    assert tokens(logits, temperature=5.0, top_k=1, uniform=draws) == logits.argmax(dim=-1).tolist()


def test_a_row_does_not_depend_on_the_others(logits: torch.Tensor) -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.5, 1.0, 2.0], len(logits)),
        "top_k": rng.integers(0, 10, len(logits)),
        "top_p": rng.uniform(0.1, 1.0, len(logits)),
        "uniform": rng.random(len(logits)),
    }
    together = tokens(logits, **columns)
    for row in range(0, len(logits), 17):
        alone = tokens(
            logits[row : row + 1], **{name: value[row : row + 1] for name, value in columns.items()}
        )
        assert alone == [together[row]]


def test_banned_tokens_are_never_taken(logits: torch.Tensor) -> None:
    best = logits.argmax(dim=-1)
    starts = np.arange(len(logits) + 1)
    found = tokens(logits, banned_start=starts, banned_ids=best.numpy())
    masked = logits.scatter(1, best[:, None], -torch.inf)
    assert found == masked.argmax(dim=-1).tolist()


def test_logprobs_are_of_the_unmodified_distribution(logits: torch.Tensor) -> None:
    wanted = np.tile([-1, 0, 3, 20], len(logits) // 4)
    answers = sample(logits, plan(len(logits), temperature=0.5, top_k=2, num_logprobs=wanted))
    truth = logits.double().log_softmax(dim=-1)
    for row, (answer, count) in enumerate(zip(answers, wanted.tolist(), strict=True)):
        if count < 0:
            assert answer.logprob is None
            continue
        assert answer.logprob == pytest.approx(truth[row, answer.token_id].item(), abs=1e-5)
        best = truth[row].topk(count) if count else None
        assert [token for token, _ in answer.top] == (best.indices.tolist() if best else [])
        assert [value for _, value in answer.top] == pytest.approx(
            best.values.tolist() if best else [], abs=1e-5
        )
