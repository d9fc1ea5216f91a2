"""Log-probabilities of tokens that are known already: those of prompts."""

from __future__ import annotations

import torch

from loraplex_server.core.step import SampledToken, StepPlan
from loraplex_server.model.run.sampler import unpack, with_logprobs
from loraplex_server.model.run.transfer import Fetch, send

PIECE_ROWS = 16
"""Rows that are normalised at a time: float32 copies of all their logits would take more than the logits."""

SCORING_BYTES = 16
"""Most bytes of a piece for one logit: float32 logits and log-probabilities, and what finds the best."""


def launch(logits: torch.Tensor, plan: StepPlan) -> Scoring:
    """Scores one token a row, under the same distribution as sampled tokens; nothing waits for the device.

    Args:
        logits: [Q, vocabulary], any floating dtype; row i belongs to `plan.score_row[i]`.
    """
    (tokens,) = send([plan.score_id], logits.device)
    most = int(plan.score_top.max())
    pieces = zip(logits.split(PIECE_ROWS), tokens.split(PIECE_ROWS), strict=True)
    return Scoring(Fetch(torch.cat([with_logprobs(*piece, most) for piece in pieces])), plan)


class Scoring:
    """Log-probabilities on their way to the host."""

    def __init__(self, fetch: Fetch, plan: StepPlan) -> None:
        self._fetch = fetch
        self._num_logprobs = plan.score_top

    def result(self) -> tuple[SampledToken, ...]:
        """Each token with its log-probability and the alternatives, once they are there."""
        return unpack(self._fetch.wait(), self._num_logprobs)
