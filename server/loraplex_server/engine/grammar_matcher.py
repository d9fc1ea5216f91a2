"""Follows one answer in its grammar: which tokens may come next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from loraplex_server.core.step import Ints

if TYPE_CHECKING:
    from llguidance import LLMatcher

WORD_BITS = 64
_MAX_REASON_CHARS = 300


class GrammarMatcher:
    """One answer's place in its grammar, after the tokens that it has taken in.

    It only goes forward: a preempted sequence keeps it. `follow` may take long and belongs on another thread;
    until it returns, no other method may be called.

    Attributes:
        mask: int64 [ceil(vocabulary / 64)]: bit t % 64 of word t // 64 says whether token t may come next.
        complete: the answer is whole: no token can follow.
        error: why the grammar cannot be followed any further; "" as long as it can.
        ready: the engine has taken up what `follow` found. The engine sets it.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, tokens: int) -> None:
        """
        Args:
            vocab_size: tokens of the base model.
            tokens: tokens of the trie: at least as many, and a multiple of `WORD_BITS`.
        """
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._words = np.zeros(tokens // WORD_BITS, np.int64)
        self.mask = self._words[: -(-vocab_size // WORD_BITS)]
        self.complete = False
        self.error = ""
        self.ready = True

    def copy(self) -> GrammarMatcher:
        """Another answer at the same place."""
        other = GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, len(self._words) * WORD_BITS)
        other._words[:] = self._words
        return other

    def follow(self, token_id: int) -> None:
        """Takes in a token that was allowed, and computes what may come next."""
        if self._matcher.consume_token(token_id) and self._matcher.is_stopped():
            self.complete = True
        else:
            self.look()

    def look(self) -> None:
        """Computes `mask`, and `error` where there can be none."""
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            self.error = reason(self._matcher.get_error())
            return
        if odd := self._vocab_size % WORD_BITS:
            # The tokenizer may know tokens that the base model does not have.
            self.mask[-1:].view(np.uint64)[:] &= np.uint64((1 << odd) - 1)
        if not self.mask.any():
            self.error = "the model has no tokens for what has to come next"

    def allowed(self, banned: Iterable[int]) -> Ints:
        """The mask without the banned tokens, int64 as `mask`; the mask itself if that would leave none."""
        barred = [token for token in banned if token < self._vocab_size]
        if not barred:
            return self.mask
        found = self.mask.copy()
        bits = found.view(np.uint64)
        for token in barred:
            bits[token // WORD_BITS] &= ~np.uint64(1 << token % WORD_BITS)
        return found if found.any() else self.mask


def reason(text: str) -> str:
    """llguidance's own words, without its state, on one line."""
    for mark in ("<state>", "<non-verbose/>"):
        text = text.partition(mark)[0]
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[: _MAX_REASON_CHARS - 1]}…"
