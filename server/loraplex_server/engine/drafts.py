"""Draft tokens for one request, from its own text: prompt lookup (Saxena, "Prompt Lookup Decoding", 2023).

What stands after the latest earlier place of the row's last few tokens is likely to come next, in answers
that copy from the prompt or repeat themselves. A step then computes the drafts beside the one token that it
has to, and samples after each of them. With the draw of its position each row samples what decoding one by
one would have sampled there: a draft is accepted if it is that token, and then the row after it stands. So
drafts change how many steps an answer takes, never the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

_WIDEST, _NARROWEST = 4, 2
"""Numbers of last tokens that are looked up, the most first."""

_FIRST_LENGTH = 4
_LONGEST_WAIT = 16

_MAX_INDEXED = 1 << 15
"""Tokens of a long prompt, from its end, that are looked at: their index takes some 12 MiB."""


class Drafter:
    """Drafts for one row of tokens, as many as are worth their while.

    Drafts that are all accepted are followed by twice as many; otherwise by as many as were accepted, and one
    more. After drafts that were worth nothing, and where there is nothing to draft from, some tokens are
    waited for, twice as many each time (both as TCP does it, Jacobson, "Congestion avoidance and control",
    1988).

    Attributes:
        drafted: tokens drafted so far.
        accepted: how many of them were accepted.
    """

    def __init__(self, most: int, limit: int, *, first: int = 0, worth: int = 1) -> None:
        """
        Args:
            most: draft tokens in one step.
            limit: tokens that the row may have at its end.
            first: place of the first token that has an id.
            worth: accepted tokens that make a step with drafts better than one without.
        """
        self._most = most
        self._limit = limit
        self._worth = min(worth, self._most)
        self._first = self._indexed = first
        # What followed the latest occurrence of each few tokens, those at the row's end left out.
        self._next: dict[tuple[int, ...], int] = {}
        self._length = min(_FIRST_LENGTH, self._most)
        self._wait = 1
        self._resume = 0
        self.drafted = 0
        self.accepted = 0

    def due(self, length: int) -> bool:
        """True if a row of `length` tokens, all of them known, may have drafts now."""
        return length >= self._resume and length + 1 < self._limit

    def propose(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        """At most `most` tokens, and often none, that may follow those of a row; `read` it before."""
        length = len(token_ids)
        count = min(most, self._length, self._limit - length - 1)
        if count < 1 or not self.due(length):
            return ()
        for width in range(_WIDEST, _NARROWEST - 1, -1):
            place = self._next.get(tuple(token_ids[-width:]))
            if place is not None:
                found = list(token_ids[place : place + count])
                # Past its end the row is taken to repeat what it has from that place on.
                return tuple((found * count)[:count])
        if self._indexed == length:
            self._pause(length)
        return ()

    def judge(self, drafted: int, accepted: int, length: int) -> None:
        """Takes in what became of the last drafts; the row has `length` tokens with those accepted."""
        self.drafted += drafted
        self.accepted += accepted
        if accepted == drafted:
            self._length = min(max(self._length, 2 * drafted), self._most)
        else:
            self._length = min(max(accepted + 1, self._worth), self._most)
        if accepted >= self._worth:
            self._wait = 1
        else:
            self._pause(length)

    def read(self, token_ids: Sequence[int], most: int) -> int:
        """Indexes what is new of a row, all of it known, at most `most` tokens: a microsecond each.

        Returns how many.
        """
        if self._indexed == self._first:
            self._indexed = max(self._first, len(token_ids) - _MAX_INDEXED)
        begin = self._indexed
        end = min(len(token_ids), begin + most)
        if end == begin:
            return 0
        tokens = tuple(token_ids[max(self._first, begin - _WIDEST) : end])
        offset = end - len(tokens)
        for place in range(begin, end):
            at = place - offset
            for width in range(_NARROWEST, min(_WIDEST, at) + 1):
                self._next[tokens[at - width : at]] = place
        self._indexed = end
        return end - begin

    def _pause(self, length: int) -> None:
        self._resume = length + self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
