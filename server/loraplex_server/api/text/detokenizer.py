"""Text from tokens, as they come: incremental detokenisation and stop strings.

A token is no piece of text by itself. A character may be split over several tokens, and a metaspace
tokenizer drops the space before a token that comes first. So the newest tokens are always decoded
together with some before them, and text is given out once no later token can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Bytes of a character are at most 4 tokens; anything held longer is malformed and is given out.
_MAX_HELD_TOKENS = 16
_MAX_TOKENS_PER_CHARACTER = 4


class TokenDecoder(Protocol):
    """The part of a tokenizer that the detokeniser uses."""

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def has_text(self, token_id: int) -> bool: ...


class Detokenizer:
    """Turns one request's tokens into text.

    After the prompt's ids P and generated ids G, all that `push` has returned, in a row, is a prefix of
    what `decode(P + G)` adds to `decode(P)`, and with `flush` it is the whole of it: prompt and answer
    read as one text, with the space that may stand between them, and a character that the prompt left
    incomplete belongs to the answer. Each token costs two decodes of a few tokens, however long the
    answer is.

    One exception: a byte-fallback decoder shows a whole run of bytes as replacement characters when any
    part of it is malformed. What was well-formed before the fault has then already been given out.
    """

    def __init__(self, decoder: TokenDecoder, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        # `_given` characters of the window's text are out, with all the text of `_settled` tokens.
        self._window, self._given = _context(decoder, prompt_token_ids)
        self._settled = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        if not self._decoder.has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._decoder.decode(self._window)
        held = len(self._window) - self._settled
        incomplete = text.endswith(_REPLACEMENT)
        if (incomplete or len(text) <= self._given) and held < _MAX_HELD_TOKENS:
            return ""
        certain = text[self._given : len(text) - incomplete]
        if incomplete or not certain:
            self._window = self._window[-_MAX_TOKENS_PER_CHARACTER:]
            self._settled = 0
        else:
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
        self._given = max(0, len(self._decoder.decode(self._window)) - incomplete)
        return certain

    def extend(self, token_ids: Sequence[int]) -> str:
        """The same for several tokens, at the price of one where the last of them ends a character."""
        shown = [token_id for token_id in token_ids if self._decoder.has_text(token_id)]
        if len(shown) > 1:
            text = self._decoder.decode(self._window + shown)
            last = self._decoder.decode(shown[-1:])
            whole = last and not last.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT)
            if whole and len(text) > self._given:
                certain = text[self._given :]
                self._window, self._given, self._settled = shown[-1:], len(last), 1
                return certain
        return "".join(map(self.push, shown))

    def flush(self) -> str:
        """The rest of the text: an incomplete character as replacement characters."""
        text = self._decoder.decode(self._window)[self._given :] if self._window else ""
        self._window, self._given, self._settled = [], 0, 0
        return text


def token_offsets(decoder: TokenDecoder, token_ids: Sequence[int]) -> list[int]:
    """For each token, how many characters of the tokens' text are certain before it."""
    detokenizer = Detokenizer(decoder)
    offsets, characters = [], 0
    for token_id in token_ids:
        offsets.append(characters)
        characters += len(detokenizer.push(token_id))
    return offsets


def _context(decoder: TokenDecoder, prompt_token_ids: Sequence[int]) -> tuple[list[int], int]:
    """The prompt's last tokens with text, from the boundary of a character on, and how many characters
    of their text belong to the prompt: all but one that is incomplete."""
    tail: list[int] = []
    for token_id in reversed(prompt_token_ids):
        if len(tail) == 2 * _MAX_TOKENS_PER_CHARACTER:
            break
        if decoder.has_text(token_id):
            tail.append(token_id)
    tail.reverse()
    for dropped in range(min(len(tail), _MAX_TOKENS_PER_CHARACTER)):
        for start in range(len(tail) - dropped):
            text = decoder.decode(tail[start : len(tail) - dropped])
            if not text.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT):
                return tail[start:], len(text)
    return (tail if len(tail) < _MAX_TOKENS_PER_CHARACTER else []), 0


class StopMatcher:
    """Finds the first of several strings in a text that comes in pieces.

    First is the one that is complete first; of several that end at the same character, the longest.
    So the outcome does not depend on where the pieces are cut. Text is held back only while it may be
    the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failure_links(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""
        self.match: str | None = None

    @property
    def held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def push(self, text: str) -> str:
        """The text that is certainly before any stop string; once `match` is set, all there is."""
        if not self._stops:
            return text
        buffer = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            longest = 0
            for index, (stop, links) in enumerate(self._stops):
                matched = self._matched[index]
                while matched and stop[matched] != character:
                    matched = links[matched]
                if stop[matched] == character:
                    matched += 1
                if matched == len(stop):
                    longest = max(longest, matched)
                self._matched[index] = matched if matched < len(stop) else links[matched]
            if longest:
                self.match = buffer[position - longest : position]
                self._held = ""
                return buffer[: position - longest]
        keep = max(self._matched)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text that was held back, when it ends without a match."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _failure_links(pattern: str) -> list[int]:
    """`links[n]`: length of the longest proper prefix of `pattern` that ends its first n characters.

    "aab" gives [0, 0, 1, 0] (Knuth, Morris and Pratt).
    """
    links = [0, 0]
    for end in range(1, len(pattern)):
        length = links[end]
        while length and pattern[length] != pattern[end]:
            length = links[length]
        links.append(length + 1 if pattern[length] == pattern[end] else 0)
    return links
