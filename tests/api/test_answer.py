"""The tokens and the text of an answer, with and without stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from loraplex_server.api.answers.answer import Answer, Finish, Piece
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core.request import FinishReason
from loraplex_server.wire.messages import TokenDelta, TokenLogprobs


class Letters:
    """Token n is the n-th of these texts; none is special."""

    TEXTS = ("a", "b", "ab", "bc", "c", "cab", "")

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.TEXTS[token_id] for token_id in token_ids)

    def has_text(self, token_id: int) -> bool:
        return True


def run(
    decoder: Any, ids: list[int], stops: list[str], cuts: Callable[[], int], *, include_stop: bool = False
) -> tuple[list[Piece], Finish]:
    answer = Answer(decoder, (), stops, include_stop=include_stop)
    pieces = []
    rest = list(ids)
    while rest:
        size = cuts()
        now, rest = rest[:size], rest[size:]
        finish = None if rest else FinishReason.LENGTH
        logprobs = tuple(TokenLogprobs(token_id, -float(token_id)) for token_id in now)
        pieces.append(answer.push(TokenDelta("r", tuple(now), logprobs, finish)))
        if pieces[-1].finish is not None:
            break
    assert answer.num_tokens == sum(len(piece.token_ids) for piece in pieces)
    assert pieces[-1].finish is not None
    return pieces, pieces[-1].finish


def test_tokens_that_begin_before_the_stop_string_are_the_answer() -> None:
    rng = random.Random(0)
    stopped = 0
    for _ in range(2000):
        ids = [rng.randrange(len(Letters.TEXTS)) for _ in range(rng.randint(1, 12))]
        stops = [
            "".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))
        ]
        pieces, finish = run(Letters(), ids, stops, lambda: rng.randint(1, 4))
        text = "".join(piece.text for piece in pieces)
        tokens = [token_id for piece in pieces for token_id in piece.token_ids]
        full = Letters().decode(ids)
        ends = [(full.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in full]
        if not ends:
            assert (text, tokens, finish.stop_match) == (full, ids, "")
            assert finish.reason == FinishReason.LENGTH
            continue
        stopped += 1
        end, _, match = min(ends)
        assert (text, finish.stop_match) == (full[: end - len(match)], match)
        assert finish.reason == FinishReason.STOP
        begins = [len(Letters().decode(ids[:index])) for index in range(len(ids))]
        assert tokens == [token_id for token_id, begin in zip(ids, begins, strict=True) if begin < len(text)]
    assert stopped > 500


def test_logprobs_stay_with_their_tokens_while_text_is_held_back() -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(len(Letters.TEXTS)) for _ in range(10)]
        pieces, _ = run(Letters(), ids, ["abca", "ccb"], lambda: rng.randint(1, 3))
        for piece in pieces:
            assert tuple(entry.token_id for entry in piece.logprobs) == piece.token_ids


def test_held_text_and_its_tokens_come_at_the_end() -> None:
    answer = Answer(Letters(), (), ["abcab"])
    first = answer.push(TokenDelta("r", (4, 0)))
    assert (first.text, first.token_ids) == ("c", (4,))
    held = answer.push(TokenDelta("r", (3,)))
    assert held.empty
    last = answer.push(TokenDelta("r", (1,), finish=FinishReason.STOP, stop_token=True))
    assert (last.text, last.token_ids) == ("abc", (0, 3, 1))
    assert last.finish == Finish(FinishReason.STOP, "", None)


def test_tokens_are_not_held_without_stop_strings(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    ids = hf_tokenizer.encode("a龘", add_special_tokens=False)
    answer = Answer(tokenizer, (), ())
    pieces = [answer.push(TokenDelta("r", (token_id,))) for token_id in ids]
    assert [piece.token_ids for piece in pieces] == [(token_id,) for token_id in ids]
    assert pieces[-2].text == ""
    assert pieces[-1].text == "龘"


def test_a_stop_string_of_many_tokens(
    tokenizer: Tokenizer, hf_tokenizer: Any, random_text: Callable[[random.Random], str]
) -> None:
    rng = random.Random(2)
    for _ in range(60):
        before, after = random_text(rng), random_text(rng)
        ids = hf_tokenizer.encode(f"{before}龘STOP龘{after}", add_special_tokens=False)
        full = tokenizer.decode(ids)
        expected = full[: full.index("龘STOP龘")]
        pieces, finish = run(tokenizer, ids, ["龘STOP龘"], lambda: rng.randint(1, 5))
        assert "".join(piece.text for piece in pieces) == expected
        assert finish.stop_match == "龘STOP龘"
        tokens = [token_id for piece in pieces for token_id in piece.token_ids]
        assert tokens == ids[: len(tokens)]
        assert tokenizer.decode(tokens).startswith(expected)


def test_the_stop_string_can_be_part_of_the_answer() -> None:
    """However the pieces are cut: the text ends with it, and every token that begins within it counts."""
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(7) for _ in range(30)]
        full = Letters().decode(ids)
        stop = "".join(rng.choice("abc") for _ in range(rng.randint(1, 4)))
        pieces, finish = run(Letters(), ids, [stop], lambda: rng.randint(1, 4), include_stop=True)
        text = "".join(piece.text for piece in pieces)
        taken = [token for piece in pieces for token in piece.token_ids]
        if stop not in full:
            assert (text, taken) == (full, ids)
            continue
        end = full.index(stop) + len(stop)
        assert text == full[:end]
        assert finish.stop_match == stop
        assert finish.reason is FinishReason.STOP
        begins = [len(Letters().decode(ids[:index])) for index in range(len(ids))]
        assert taken == [token for token, begin in zip(ids, begins, strict=True) if begin < end][: len(taken)]
        assert len(Letters().decode(taken)) >= end
