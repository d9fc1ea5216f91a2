"""Deadlines that no engine of this speed could meet."""

from __future__ import annotations

from collections.abc import Collection

from loraplex_server.core.errors import DeadlineExceededError, Reason
from loraplex_server.core.request import Request

# Fewer answers, or shorter ones, say too little about the engine's speed.
_MIN_ANSWERS = 8
_MIN_TOKENS = 16
# A deadline is refused only if the answer would have to be twice as fast as any so far.
_MARGIN = 0.5


class FastestAnswer:
    """The least time that a token has taken in any answer so far; only ever falls.

    What waits in the queue is not counted, nor how full the batch is: both may be gone the next moment.
    """

    def __init__(self) -> None:
        self._answers = 0
        self._token_s = float("inf")

    def learn(self, tokens: int, seconds: float) -> None:
        """Notes an answer whose `tokens` after its first took the engine `seconds`."""
        if tokens >= _MIN_TOKENS:
            self._answers += 1
            self._token_s = min(self._token_s, seconds / tokens)

    def least_s(self, tokens: int) -> float:
        """Seconds that an answer of so many tokens takes at least; 0 while too little is known."""
        return self._token_s * tokens * _MARGIN if self._answers >= _MIN_ANSWERS else 0.0

    def check(self, request: Request, stops: Collection[str], left_s: float, default_drafts: int) -> None:
        """Checks that an answer can be there in `left_s` seconds.

        Args:
            default_drafts: draft tokens a step for a request that does not say.

        Raises:
            DeadlineExceededError: it cannot.
        """
        tokens, drafts = certain_tokens(request, stops), request.speculative_tokens
        if drafts is None:
            drafts = default_drafts
        # At best every draft is accepted, which the fastest answer may not have seen.
        least_s = self.least_s(tokens) / (1 + drafts)
        if left_s < least_s:
            raise DeadlineExceededError(
                f"{tokens} tokens take {least_s:.2g} s at least, and the deadline is in {left_s:.2g} s",
                reason=Reason.DEADLINE_TOO_SHORT,
            )


def certain_tokens(request: Request, stops: Collection[str]) -> int:
    """The fewest tokens that an answer can have, whatever the model says."""
    sampling = request.sampling
    if stops or request.structure is not None:
        return min(1, sampling.max_tokens)
    if sampling.ignore_eos and not sampling.stop_token_ids:
        return sampling.max_tokens
    return min(max(1, sampling.min_tokens), sampling.max_tokens)
