"""Sampling: greedy, or by inverting the cumulative distribution at a given uniform draw.

It runs on the device: one copy takes the parameters there, and one brings the results back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from loraplex_server.core.step import SampledToken, StepPlan
from loraplex_server.model.run.transfer import Fetch, Words, send


def sample(logits: torch.Tensor, plan: StepPlan) -> tuple[SampledToken, ...]:
    """Samples one token per row and waits for the tokens; see `launch`."""
    return launch(logits, plan).result()


def launch(logits: torch.Tensor, plan: StepPlan) -> Sampling:
    """Samples one token per row, without waiting for the device.

    The logits are changed in the order of transformers' processors: bias, penalties, bans, masks. Then
    temperature, top-k, top-p and min-p determine the tokens that can be drawn, in descending order of
    probability. The drawn token is the first at which their cumulative probability exceeds the row's draw.
    There is no random generator: a row's token depends only on its logits, its parameters and its draw.

    If a row's logits are not numbers, or all its tokens are banned, its result is -1. On the device the row
    has some valid token id, so that the next step can run.

    Args:
        logits: [S, vocabulary], any floating dtype; row i belongs to `plan.sample_row[i]`.
    """
    scores = logits.float()
    drawn = np.flatnonzero(plan.temperature > 0)
    changes, draws = _inputs(plan, drawn, logits)
    scores = _changed(scores, changes)
    chosen = scores.argmax(dim=-1)
    if draws is not None:
        rows, *parameters = draws
        # If every row is drawn, index_select would only copy all the scores.
        part = scores if len(drawn) == len(scores) else scores.index_select(0, rows)
        chosen = chosen.index_copy(0, rows, _draw(part, *parameters))
    # argmax and sort treat NaN as the largest value: a row with a NaN has chosen it.
    found = chosen.masked_fill(~scores.gather(-1, chosen[:, None]).squeeze(-1).isfinite(), -1)
    most = int(plan.num_logprobs.max(initial=-1))
    if most >= 0:
        found = with_logprobs(logits, chosen, most, found)
    return Sampling(chosen, Fetch(found), plan.num_logprobs)


class Sampling:
    """The sampled tokens, on the device and on the way to the host.

    Attributes:
        tokens: int64 [S] on the device; always valid token ids.
    """

    def __init__(self, tokens: torch.Tensor, fetch: Fetch, num_logprobs: np.ndarray) -> None:
        self.tokens = tokens
        self._fetch = fetch
        self._num_logprobs = num_logprobs

    def result(self) -> tuple[SampledToken, ...]:
        """Waits for the tokens; -1 for rows in which none could be sampled."""
        values = self._fetch.wait()
        if values.ndim == 1:
            return tuple(SampledToken(token) for token in values.tolist())
        return unpack(values, self._num_logprobs)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Changes of the logits, as tensors over (row, token) pairs; None if no row has such a change."""

    bias: list[torch.Tensor] | None
    """Row, token and added value of each pair."""
    penalties: list[torch.Tensor] | None
    """Row, token, count in the answer, and repetition, presence and frequency penalty of each pair."""
    bans: list[torch.Tensor] | None
    """Row and token of each pair."""
    masks: list[torch.Tensor] | None
    """Rows [G], and their mask words [G * words], one row after the other."""


def _inputs(
    plan: StepPlan, drawn: np.ndarray, logits: torch.Tensor
) -> tuple[_Changes, list[torch.Tensor] | None]:
    """The optional inputs on the device: the changes, and the parameters of the rows that are drawn.

    The latter are row, temperature, top-k, top-p, min-p and uniform draw, each [len(drawn)]; None if every
    row is greedy.
    """
    groups: list[list[Words]] = [[], [], [], [], []]
    if len(plan.bias_ids):
        groups[0] = [_rows(plan.bias_start), plan.bias_ids, plan.bias_value]
    if len(plan.seen_ids):
        rows = _rows(plan.seen_start)
        groups[1] = [rows, plan.seen_ids, plan.seen_count.astype(np.float64)]
        groups[1] += [
            plan.repetition_penalty[rows],
            plan.presence_penalty[rows],
            plan.frequency_penalty[rows],
        ]
    if len(plan.banned_ids):
        groups[2] = [_rows(plan.banned_start), plan.banned_ids]
    if len(drawn):
        top_k = np.where(plan.top_k > 0, plan.top_k, logits.shape[-1])
        min_p = plan.min_p if len(plan.min_p) else np.zeros(len(top_k))
        columns = (plan.temperature, top_k, plan.top_p, min_p, plan.uniform)
        groups[3] = [drawn, *(column[drawn] for column in columns)]
    if len(plan.masked_row):
        groups[4] = [plan.masked_row, plan.mask_words]
    arrays = [array for group in groups for array in group]
    sent = iter(send(arrays, logits.device) if arrays else [])
    bias, penalties, bans, draws, masks = ([next(sent) for _ in group] or None for group in groups)
    return _Changes(bias, penalties, bans, masks), draws


def _rows(starts: np.ndarray) -> np.ndarray:
    """The row of each element of a field that `starts` divides into rows."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _changed(scores: torch.Tensor, changes: _Changes) -> torch.Tensor:
    """The scores [S, vocabulary] with every change; `scores` itself is not modified."""
    if changes.bias is not None:
        rows, tokens, value = changes.bias
        scores = scores.index_put((rows, tokens), scores[rows, tokens] + value.float())
    if changes.penalties is not None:
        rows, tokens, times, repetition, presence, frequency = changes.penalties
        found, penalty = scores[rows, tokens], repetition.float()
        found = torch.where(found < 0, found * penalty, found / penalty)
        found = found - (presence * (times > 0) + frequency * times).float()
        scores = scores.index_put((rows, tokens), found)
    if changes.bans is not None:
        rows, tokens = changes.bans
        scores = scores.index_put((rows, tokens), scores.new_full((), -torch.inf))
    if changes.masks is not None:
        scores = _masked(scores, *changes.masks)
    return scores


def _masked(scores: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Scores [S, vocabulary] in which tokens that a row's mask does not allow are -inf.

    Args:
        rows: int64 [G], the rows with a mask; others do not change.
        words: int64 [G * words]; bit t % 64 of a row's word t // 64 allows token t.
    """
    width = scores.shape[-1]
    bits = words.view(torch.uint8).view(len(rows), -1, 1) >> torch.arange(
        8, dtype=torch.uint8, device=words.device
    )
    barred = (bits & 1 == 0).flatten(1)[:, :width]
    # Tokens that adapters add have no bit, and are not allowed.
    barred = torch.nn.functional.pad(barred, (0, width - barred.shape[1]), value=True)
    if len(rows) == len(scores):
        return scores.masked_fill(barred, -torch.inf)
    return scores.index_copy(0, rows, scores.index_select(0, rows).masked_fill(barred, -torch.inf))


def _draw(
    scores: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Drawn tokens, int64 [R], of scores [R, vocabulary]; each parameter is [R]."""
    width = scores.shape[-1]
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    # float64: with a large vocabulary, a float32 sum would lose the tail's probability.
    mass = (ordered.double() / temperature[:, None]).softmax(dim=-1)
    kept = torch.arange(width, device=scores.device) < top_k[:, None]
    mass = mass * kept
    mass = mass / mass.sum(dim=-1, keepdim=True)
    before = mass.cumsum(dim=-1) - mass
    # The most probable token is always kept; min_p is relative to its probability.
    mass = mass * ((before < top_p[:, None]) & (mass >= min_p[:, None] * mass[:, :1]) & kept)
    reached = mass.cumsum(dim=-1)
    pick = (reached <= uniform[:, None] * reached[:, -1:]).sum(dim=-1, keepdim=True)
    # If the scores are not numbers, no token has a mass above 0, and any token will do.
    last = ((mass > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(-1, torch.minimum(pick, last)).squeeze(-1)


def with_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, most: int, named: torch.Tensor | None = None
) -> torch.Tensor:
    """Packs tokens and their log-probabilities in one int32 tensor [S, 2 + 2 * most].

    Columns: the token, its log-probability, the ids of the `most` most probable tokens, and their
    log-probabilities. Log-probabilities are float32, stored as their bits. `most` is limited to the
    vocabulary.

    Args:
        logits: [S, vocabulary].
        tokens: int64 [S].
        named: int64 [S], token ids to write in place of `tokens`.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, tokens[:, None])
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    named = tokens if named is None else named
    columns = (named[:, None].int(), chosen.view(torch.int32), ids.int(), values.view(torch.int32))
    return torch.cat(columns, dim=1)


def unpack(values: np.ndarray[Any, Any], num_logprobs: np.ndarray) -> tuple[SampledToken, ...]:
    """Unpacks the result of `with_logprobs`.

    Args:
        num_logprobs: [S], number of alternatives for each token; below 0 also drops its log-probability.
    """
    found = []
    floats = values.view(np.float32)
    most = (values.shape[1] - 2) // 2
    for row, (count, token) in enumerate(zip(num_logprobs.tolist(), values[:, 0].tolist(), strict=True)):
        if count < 0:
            found.append(SampledToken(token))
            continue
        top = min(count, most)
        ids, logprobs = values[row, 2 : 2 + top], floats[row, 2 + most : 2 + most + top]
        best = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
        found.append(SampledToken(token, floats[row, 1].item(), best))
    return tuple(found)
