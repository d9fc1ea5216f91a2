"""From logits to tokens: greedy, or the inverse of the cumulative distribution at one given draw.

All of it runs on the device: the parameters travel there in one copy, the results back in one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from loraplex_server.core.step import SampledToken, StepPlan
from loraplex_server.model.run.transfer import Fetch, Words, send


def sample(logits: torch.Tensor, plan: StepPlan) -> tuple[SampledToken, ...]:
    """`launch`, and the tokens waited for."""
    return launch(logits, plan).result()


def launch(logits: torch.Tensor, plan: StepPlan) -> Sampling:
    """Samples one token a row; nothing waits for the device.

    Logits are changed in the order of transformers' processors: bias, penalties, bans, masks; then
    temperature, top-k, top-p and min-p say what may be drawn. A drawn token is the first, in descending order
    of probability, at which the cumulative mass of what is left exceeds the row's draw: no random generator,
    so a row's token depends on its logits, its parameters and its draw alone. A row whose logits are not
    numbers, or all of whose tokens are banned, gets -1; the device goes on with some token that there is.

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
        # Without this, where every row is drawn, all the scores would be copied.
        part = scores if len(drawn) == len(scores) else scores.index_select(0, rows)
        chosen = chosen.index_copy(0, rows, _draw(part, *parameters))
    # What is no number is the best of its row.
    found = chosen.masked_fill(~scores.gather(-1, chosen[:, None]).squeeze(-1).isfinite(), -1)
    most = int(plan.num_logprobs.max(initial=-1))
    if most >= 0:
        found = with_logprobs(logits, chosen, most, found)
    return Sampling(chosen, Fetch(found), plan.num_logprobs)


class Sampling:
    """One token a row, on the device, and on the way to the host.

    Attributes:
        tokens: int64 [S], on the device.
    """

    def __init__(self, tokens: torch.Tensor, fetch: Fetch, num_logprobs: np.ndarray) -> None:
        self.tokens = tokens
        self._fetch = fetch
        self._num_logprobs = num_logprobs

    def result(self) -> tuple[SampledToken, ...]:
        """The tokens, once they are there."""
        values = self._fetch.wait()
        if values.ndim == 1:
            return tuple(SampledToken(token) for token in values.tolist())
        return unpack(values, self._num_logprobs)


@dataclasses.dataclass(frozen=True)
class _Changes:
    """Changes of the logits, each with the (row, token) pairs that it is about; None where no row has any."""

    bias: list[torch.Tensor] | None
    """Rows, tokens, values."""
    penalties: list[torch.Tensor] | None
    """Rows, tokens, times generated, and three penalties for each pair."""
    bans: list[torch.Tensor] | None
    """Rows, tokens."""
    masks: list[torch.Tensor] | None
    """Rows, and the words of their bits, one row's after the other's."""


def _inputs(
    plan: StepPlan, drawn: np.ndarray, logits: torch.Tensor
) -> tuple[_Changes, list[torch.Tensor] | None]:
    """What greedy rows do not need: the changes; and rows, temperature, top-k, top-p, min-p and draw."""
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
    """Row of each element of a section that `starts` divides."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _changed(scores: torch.Tensor, changes: _Changes) -> torch.Tensor:
    """Scores [S, vocabulary] with every change; `scores` itself stays as it is."""
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
    """Scores [S, vocabulary] with what the bits of `rows` do not allow at -inf; other rows as they are.

    Args:
        words: int64 [rows * words]; bit t % 64 of a row's word t // 64 is token t's.
    """
    width = scores.shape[-1]
    bits = words.view(torch.uint8).view(len(rows), -1, 1) >> torch.arange(
        8, dtype=torch.uint8, device=words.device
    )
    barred = (bits & 1 == 0).flatten(1)[:, :width]
    # Tokens of adapters have no bit.
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
    """Tokens [R] of scores [R, vocabulary], at one parameter a row."""
    width = scores.shape[-1]
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    # Double precision: with a large vocabulary the tail's mass would be lost in a float sum.
    mass = (ordered.double() / temperature[:, None]).softmax(dim=-1)
    kept = torch.arange(width, device=scores.device) < top_k[:, None]
    mass = mass * kept
    mass = mass / mass.sum(dim=-1, keepdim=True)
    before = mass.cumsum(dim=-1) - mass
    # The most probable token stays whatever top_p is; min_p asks for a share of its mass.
    mass = mass * ((before < top_p[:, None]) & (mass >= min_p[:, None] * mass[:, :1]) & kept)
    reached = mass.cumsum(dim=-1)
    pick = (reached <= uniform[:, None] * reached[:, -1:]).sum(dim=-1, keepdim=True)
    # None, where the scores are not numbers: any token will do.
    last = ((mass > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return tokens.gather(-1, torch.minimum(pick, last)).squeeze(-1)


def with_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, most: int, named: torch.Tensor | None = None
) -> torch.Tensor:
    """int32 [S, 2 + 2 * most]: token, its log-probability's bits, ids of the best, their log-probabilities'
    bits. `most` is the vocabulary at most; `named` is written in the place of `tokens`.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, tokens[:, None])
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    named = tokens if named is None else named
    columns = (named[:, None].int(), chosen.view(torch.int32), ids.int(), values.view(torch.int32))
    return torch.cat(columns, dim=1)


def unpack(values: np.ndarray[Any, Any], num_logprobs: np.ndarray) -> tuple[SampledToken, ...]:
    """The tokens of what `with_logprobs` made, each with as many alternatives as were asked for; a count
    below 0 is a token alone.
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
