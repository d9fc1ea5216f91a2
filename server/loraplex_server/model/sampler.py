"""From logits to tokens: greedy, or the inverse of the cumulative distribution at one given draw."""

from __future__ import annotations

import numpy as np
import torch

from loraplex_server.core.step import SampledToken, StepPlan


def sample(logits: torch.Tensor, plan: StepPlan) -> tuple[SampledToken, ...]:
    """One token a row.

    A drawn token is the first, in descending order of probability, at which the cumulative mass of
    those kept by top-k and top-p exceeds the row's draw: no random generator, so a row's token depends
    on its logits and its draw alone.

    Args:
        logits: [S, vocabulary], any floating dtype; row i belongs to `plan.sample_row[i]`.
    """
    scores = logits.float()
    if len(plan.banned_ids):
        scores = _ban(scores, plan)
    chosen = scores.argmax(dim=-1)
    drawn = np.flatnonzero(plan.temperature > 0)
    if len(drawn):
        rows = torch.from_numpy(drawn).to(logits.device)
        chosen[rows] = _draw(scores[rows], plan, drawn)
    tokens = chosen.tolist()
    if plan.num_logprobs.max(initial=-1) < 0:
        return tuple(SampledToken(token) for token in tokens)
    return _with_logprobs(logits, tokens, plan)


def _ban(scores: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    rows = np.repeat(np.arange(len(plan.banned_start) - 1), np.diff(plan.banned_start))
    index = torch.from_numpy(rows).to(scores.device), torch.from_numpy(plan.banned_ids).to(scores.device)
    return scores.index_put(index, torch.tensor(-torch.inf, device=scores.device))


def _draw(scores: torch.Tensor, plan: StepPlan, drawn: np.ndarray) -> torch.Tensor:
    device, width = scores.device, scores.shape[-1]
    temperature, top_p, uniform = (
        torch.from_numpy(values[drawn]).to(device)[:, None]
        for values in (plan.temperature, plan.top_p, plan.uniform)
    )
    top_k = torch.from_numpy(np.where(plan.top_k[drawn] > 0, plan.top_k[drawn], width)).to(device)[:, None]
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    # Double precision: with a large vocabulary the tail's mass would be lost in a float sum.
    mass = (ordered.double() / temperature).softmax(dim=-1)
    kept = torch.arange(width, device=device) < top_k
    mass = mass * kept
    mass = mass / mass.sum(dim=-1, keepdim=True)
    before = mass.cumsum(dim=-1) - mass
    # The most probable token stays whatever top_p is.
    mass = mass * ((before < top_p) & kept)
    reached = mass.cumsum(dim=-1)
    pick = (reached <= uniform * reached[:, -1:]).sum(dim=-1, keepdim=True)
    last = (mass > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(-1, torch.minimum(pick, last)).squeeze(-1)


def _with_logprobs(logits: torch.Tensor, tokens: list[int], plan: StepPlan) -> tuple[SampledToken, ...]:
    logprobs = logits.float().log_softmax(dim=-1)
    most = int(plan.num_logprobs.max())
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(-1).tolist()
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    found = []
    for token, logprob, count, row_ids, row_values in zip(
        tokens, chosen, plan.num_logprobs.tolist(), ids.tolist(), values.tolist(), strict=True
    ):
        if count < 0:
            found.append(SampledToken(token))
        else:
            top = tuple(zip(row_ids[:count], row_values[:count], strict=True))
            found.append(SampledToken(token, logprob, top))
    return tuple(found)
