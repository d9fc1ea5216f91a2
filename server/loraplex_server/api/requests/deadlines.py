"""Deadlines that no engine of this speed could meet."""

from __future__ import annotations

from collections.abc import Collection

from loraplex_server.core.request import Request

_MIN_ANSWERS = 8
_MIN_TOKENS = 16
# Nothing is refused that might be met: it has to be twice as fast as it ever was.
_MARGIN = 0.5


class FastestAnswer:
    """The least time that a token has taken in any answer so far; only ever falls.

    What waits in the queue is not counted, nor how full the batch is: both may be gone the next moment.
    """

    def __init__(self) -> None:
        self._answers = 0
        self._token_s = float("inf")

    def learn(self, tokens: int, seconds: float) -> None:
        """An answer's `tokens` after its first took the engine `seconds`."""
        if tokens >= _MIN_TOKENS:
            self._answers += 1
            self._token_s = min(self._token_s, seconds / tokens)

    def least_s(self, tokens: int) -> float:
        """Seconds that an answer of so many tokens takes at least; 0 while too little is known."""
        return self._token_s * tokens * _MARGIN if self._answers >= _MIN_ANSWERS else 0.0


def certain_tokens(request: Request, stops: Collection[str]) -> int:
    """Tokens that an answer has at least, whatever the model says."""
    sampling = request.sampling
    if stops or request.structure is not None:
        return min(1, sampling.max_tokens)
    if sampling.ignore_eos and not sampling.stop_token_ids:
        return sampling.max_tokens
    return min(max(1, sampling.min_tokens), sampling.max_tokens)
