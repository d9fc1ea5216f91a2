"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from loraplex_server.api.text.detokenizer import StopMatcher


def oracle(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The match that ends first, the longest of those; by trying everything."""
    for end in range(1, len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[:start], text[start:end]
    return text, None


def run(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.match is not None:
            return out, matcher.match
    return out + matcher.flush(), None


def test_matches_what_trying_everything_finds_however_the_text_is_cut() -> None:
    rng = random.Random(0)
    matches = 0
    for _ in range(3000):
        text = "".join(rng.choice("abc") for _ in range(rng.randint(0, 14)))
        stops = [
            "".join(rng.choice("abc") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(0, 3))
        ]
        pieces, rest = [], text
        while rest:
            size = rng.randint(0, 4)
            pieces.append(rest[:size])
            rest = rest[size:]
        expected = oracle(text, stops)
        assert run(pieces, stops) == expected
        matches += expected[1] is not None
    assert 500 < matches < 2900


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert matcher.push("hello EN") == "hello "
    assert matcher.held == 2
    assert matcher.push("jambment\n") == "ENjambment"
    assert matcher.push("\nUse") == ""
    assert matcher.push("d") == "\n\nUsed"
    assert matcher.push(" E") == " "
    assert matcher.push("NDING") == ""
    assert matcher.match == "END"


@pytest.mark.parametrize("stop", ["aab", "aaaa", "abab", "🙂🙂"])
def test_repetitive_stops(stop: str) -> None:
    text = stop[:-1] + stop + "tail"
    assert run(list(text), [stop]) == oracle(text, [stop])
