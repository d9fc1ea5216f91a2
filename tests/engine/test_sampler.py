"""Sampling: greedy, filters, the one draw a token has, masks and log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_server.core.random import uniform
from loraplex_server.core.request import Request, SamplingParams
from loraplex_server.core.step import StepPlan
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.engine.sequence import Sequence
from loraplex_server.engine.token_counts import TokenCounts
from loraplex_server.model.run.sampler import sample


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


class TestAgainstTransformers:
    """The scores a token is chosen from are those of transformers' own processors."""

    def processed(self, logits: torch.Tensor, seen: list[list[int]], **settings: Any) -> torch.Tensor:
        """transformers' scores, the processors in the order `generate` has them."""
        from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=logits.shape[1],
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        )
        config = GenerationConfig(do_sample=True, eos_token_id=2, **settings)
        model._prepare_special_tokens(config, device="cpu")
        found = []
        for row, tokens_so_far in enumerate(seen):
            ids = torch.tensor([tokens_so_far])
            processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu")
            found.append(processors(ids, logits[row : row + 1].clone()))
        return torch.cat(found)

    @pytest.mark.parametrize("seed", range(4))
    def test_all_settings_in_one_batch(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows, width = 24, 60
        logits = torch.from_numpy(rng.normal(size=(rows, width)) * 3).float()
        sequences, answers = [], []
        for row in range(rows):
            params = SamplingParams(
                temperature=float(rng.choice([0.5, 1.0, 2.0])),
                top_k=int(rng.choice([0, 5, 20])),
                top_p=float(rng.choice([1.0, 0.7])),
                min_p=float(rng.choice([0.0, 0.1])),
                repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
                logit_bias=tuple(
                    (int(t), float(rng.normal())) for t in rng.permutation(width)[: rng.integers(4)]
                ),
                bad_words=((3,), (int(rng.integers(width)), 7)) if row % 2 else (),
                seed=row,
            )
            prompt = tuple(int(t) for t in rng.integers(0, width, 6))
            sequence = Sequence(Request(str(row), prompt, params), "client", ())
            sequence.token_ids += [int(t) for t in rng.integers(0, width, 5)]
            sequence.num_computed = len(sequence.token_ids) - 1
            sequence.block_table = [0]
            sequences.append(sequence)
            settings: dict[str, Any] = {
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p or None,
                "repetition_penalty": params.repetition_penalty,
                "sequence_bias": {(token,): value for token, value in params.logit_bias} or None,
                "bad_words_ids": [list(word) for word in params.bad_words] or None,
            }
            answers.append(self.processed(logits[row : row + 1], [sequence.token_ids], **settings))
        oracle = torch.cat(answers).double().softmax(dim=-1)
        # Draws all over the distribution: a token is taken just where transformers leaves it its mass.
        for draw in np.linspace(0.001, 0.999, 25):
            step = build_plan([Scheduled(s, 1) for s in sequences], 16, lambda handle: 0, (2,))
            step = dataclasses.replace(step, uniform=np.full(rows, draw))
            found = [answer.token_id for answer in sample(logits, step)]
            ordered = oracle.sort(dim=-1, descending=True, stable=True)
            reached = ordered.values.cumsum(dim=-1)
            for row, token in enumerate(found):
                place = int((ordered.indices[row] == token).nonzero())
                before = float(reached[row, place - 1]) if place else 0.0
                assert before - 1e-5 <= draw <= float(reached[row, place]) + 1e-5
                assert oracle[row, token] > 0

    def test_greedy_rows_are_changed_as_well(self) -> None:
        logits = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
        for params, best in (
            (SamplingParams(repetition_penalty=2.0), 1),
            (SamplingParams(presence_penalty=1.5), 0),
            (SamplingParams(logit_bias=((3, 100.0),)), 3),
            (SamplingParams(bad_words=((0,),)), 1),
            (SamplingParams(bad_words=((0, 0),)), 1),
            (SamplingParams(bad_words=((1, 0),)), 0),
        ):
            sequence = Sequence(Request("r", (0, 0), params), "client", ())
            sequence.num_computed, sequence.block_table = 1, [0]
            step = build_plan([Scheduled(sequence, 1)], 16, lambda handle: 0, ())
            assert [answer.token_id for answer in sample(logits, step)] == [best], params

    def test_presence_and_frequency_count_what_was_generated(self) -> None:
        """As the OpenAI API has it: logit - presence * [c > 0] - frequency * c, the prompt left out."""
        rng = np.random.default_rng(1)
        logits = torch.from_numpy(rng.normal(size=(1, 8))).float()
        params = SamplingParams(temperature=1.0, presence_penalty=0.7, frequency_penalty=0.4)
        sequence = Sequence(Request("r", (0, 0, 1), params), "client", ())
        sequence.token_ids += [1, 2, 2, 2, 5]
        sequence.num_computed, sequence.block_table = len(sequence.token_ids) - 1, [0]
        counts = torch.tensor([0, 1, 3, 0, 0, 1, 0, 0])
        truth = (logits - 0.7 * (counts > 0) - 0.4 * counts).double().softmax(dim=-1)[0]
        draws = (np.arange(20_000) + 0.5) / 20_000
        found = []
        step = build_plan([Scheduled(sequence, 1)], 16, lambda handle: 0, ())
        for draw in draws[::20]:
            found.append(sample(logits, dataclasses.replace(step, uniform=np.array([draw])))[0].token_id)
        share = np.bincount(found, minlength=8) / len(found)
        assert np.abs(share - truth.numpy()).max() < 2e-3


def test_counts_are_kept_as_a_sequence_grows() -> None:
    rng = np.random.default_rng(0)
    counts = TokenCounts()
    known = [-1, -2, *(int(t) for t in rng.integers(0, 200, 30))]
    for _ in range(60):
        ids, times = counts.update(known, 32)
        truth = {token: known[32:].count(token) for token in known if token >= 0}
        assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == truth
        known += [int(t) for t in rng.integers(0, 200, int(rng.integers(0, 9)))]


def test_draws_with_every_setting_follow_the_distribution() -> None:
    """20,000 draws against the changed distribution, by a chi-square bound."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5, 0.3]])
    params = SamplingParams(
        temperature=0.8,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        logit_bias=((2, 1.0),),
        seed=9,
    )
    sequence = Sequence(Request("r", (0, 1), params), "client", ())
    sequence.token_ids += [4]
    sequence.num_computed, sequence.block_table = 2, [0]
    step = build_plan([Scheduled(sequence, 1)], 16, lambda handle: 0, ())
    changed = torch.tensor([2 / 1.2, 1 / 1.2, 1.0, -1.0, 1.5 / 1.2 - 0.3, 0.3]).double() / 0.8
    mass = changed.softmax(dim=-1)
    mass = mass * (mass >= 0.05 * mass.max())
    truth = (mass / mass.sum()).numpy()
    rows = 20_000
    many = dataclasses.replace(
        step,
        sample_row=np.zeros(rows, np.int64),
        **{
            name: np.repeat(getattr(step, name), rows)
            for name in (
                *("temperature", "top_k", "top_p", "num_logprobs", "min_p"),
                *("repetition_penalty", "presence_penalty", "frequency_penalty"),
            )
        },
        uniform=np.array([uniform(9, position) for position in range(rows)]),
        banned_start=np.zeros(rows + 1, np.int64),
        **{
            f"{name}_start": np.arange(rows + 1) * len(getattr(step, f"{name}_ids"))
            for name in ("bias", "seen")
        },
        **{
            name: np.tile(getattr(step, name), rows)
            for name in ("bias_ids", "bias_value", "seen_ids", "seen_count")
        },
    )
    found = np.bincount([answer.token_id for answer in sample(logits.expand(rows, -1), many)], minlength=6)
    kept = truth > 0
    assert not found[~kept].any()
    assert ((found[kept] - truth[kept] * rows) ** 2 / (truth[kept] * rows)).sum() < 20
