"""The distinct tokens of a sequence and their counts, which penalties need; kept up to date as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


class TokenCounts:
    """Distinct tokens of one sequence and how often each was generated; 0 for those of the prompt alone."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.empty(64, np.int64)
        self._seen = 0

    def update(self, token_ids: Sequence[int], num_prompt: int) -> tuple[Ints, Ints]:
        """Takes in the tokens that are new since the last call; (ids, counts) of all, in order of appearance.

        Args:
            token_ids: all of the sequence's; negative ones (virtual tokens) are none.
            num_prompt: those at the beginning that were not generated.

        Returns:
            Views, valid until the next call.
        """
        for position in range(self._seen, len(token_ids)):
            token = token_ids[position]
            if token >= 0:
                place = self._place_of(token)
                self._counts[place] += position >= num_prompt
        self._seen = len(token_ids)
        size = len(self._place)
        return self._ids[:size], self._counts[:size]

    def with_more(self, token_ids: Sequence[int]) -> tuple[Ints, Ints]:
        """The result of `update` if these had been generated, too; nothing of it is kept."""
        size = len(self._place)
        counts = self._counts[:size].copy()
        more: dict[int, int] = {}
        for token in token_ids:
            place = self._place.get(token)
            if place is None:
                more[token] = more.get(token, 0) + 1
            else:
                counts[place] += 1
        return (
            np.concatenate([self._ids[:size], np.array([*more], np.int64)]),
            np.concatenate([counts, np.array([*more.values()], np.int64)]),
        )

    def _place_of(self, token: int) -> int:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._ids[place], self._counts[place] = token, 0
        return place
