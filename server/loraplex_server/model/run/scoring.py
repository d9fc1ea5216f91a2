"""Log-probabilities of known tokens, those of prompts."""

from __future__ import annotations

import torch

from loraplex_server.core.step import SampledToken, StepPlan
from loraplex_server.model.run.sampler import unpack, with_logprobs
from loraplex_server.model.run.transfer import Fetch, send

PIECE_ROWS = 16
"""Rows to normalise at a time: float32 copies of all rows would take more memory than the logits."""

SCORING_BYTES = 16
"""Most bytes of a piece per logit: float32 logits and log-probabilities, and scratch memory of top-k."""


def launch(logits: torch.Tensor, plan: StepPlan) -> Scoring:
    """Scores one token per row under the model's unmodified distribution, without waiting for the device.

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
        """Waits for the tokens' log-probabilities and alternatives."""
        return unpack(self._fetch.wait(), self._num_logprobs)
