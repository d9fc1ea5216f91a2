"""Incremental detokenisation against decoding everything at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from loraplex_server.api.text.detokenizer import Detokenizer
from loraplex_server.api.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


def run(tokenizer: Tokenizer, generated: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token_id) for token_id in generated), detokenizer.flush()]


def test_text_is_at_every_token_a_prefix_of_the_full_decode(
    tokenizer: Tokenizer, hf_tokenizer: Any, random_text: Callable[[random.Random], str]
) -> None:
    rng = random.Random(1)
    for _ in range(150):
        ids = hf_tokenizer.encode(random_text(rng) + rng.choice(["", REPLACEMENT]))
        full = hf_tokenizer.decode(ids, skip_special_tokens=True)
        so_far = ""
        for piece in run(tokenizer, ids):
            so_far += piece
            assert full.startswith(so_far)
        assert so_far == full


def test_prompt_and_answer_read_as_one_text_wherever_they_are_cut(
    tokenizer: Tokenizer, hf_tokenizer: Any, random_text: Callable[[random.Random], str]
) -> None:
    rng = random.Random(2)
    for _ in range(150):
        ids = hf_tokenizer.encode(random_text(rng))
        cut = rng.randint(0, len(ids))
        prompt, generated = ids[:cut], ids[cut:]
        full = tokenizer.decode(ids)
        # A character that the prompt leaves incomplete belongs to the answer.
        before = next(
            text
            for text in (tokenizer.decode(prompt[: max(0, cut - dropped)]) for dropped in range(4))
            if not text.endswith(REPLACEMENT)
        )
        assert before + "".join(run(tokenizer, generated, prompt)) == full


def test_the_space_before_the_first_word_is_kept(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    metaspace = (
        "▁" in hf_tokenizer.convert_ids_to_tokens(hf_tokenizer.encode("the", add_special_tokens=False))[0]
    )
    answer = hf_tokenizer.encode("world" if metaspace else " world", add_special_tokens=False)
    assert "".join(run(tokenizer, answer, hf_tokenizer.encode("hello"))) == " world"


@pytest.mark.parametrize("hf_tokenizer", ["byte_level_bpe"], indirect=True)
def test_any_token_ids_decode_exactly_with_a_byte_level_tokenizer(
    tokenizer: Tokenizer, hf_tokenizer: Any
) -> None:
    rng = random.Random(3)
    for _ in range(150):
        ids = [rng.randrange(len(hf_tokenizer) + 10) for _ in range(80)]
        assert "".join(run(tokenizer, ids)) == hf_tokenizer.decode(ids, skip_special_tokens=True)


def test_malformed_bytes_stay_close_to_the_full_decode(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    rng = random.Random(4)
    for _ in range(150):
        ids = [rng.randrange(len(hf_tokenizer)) for _ in range(80)]
        text = "".join(run(tokenizer, ids))
        full = hf_tokenizer.decode(ids, skip_special_tokens=True)
        if REPLACEMENT not in full:
            assert text == full
        # What stands for the malformed runs may differ, but nothing beside them is lost.
        characters = iter(text)
        assert all(character in characters for character in full.replace(REPLACEMENT, ""))


def test_special_tokens_have_no_text_and_do_not_come_between(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    ids = hf_tokenizer.encode("the café 龘 hello", add_special_tokens=False)
    eos = hf_tokenizer.eos_token_id
    mixed = [token_id for plain in ids for token_id in (plain, eos, len(hf_tokenizer) + 5)]
    assert "".join(run(tokenizer, mixed)) == hf_tokenizer.decode(ids)


def test_an_incomplete_character_waits_and_is_shown_at_the_end(
    tokenizer: Tokenizer, hf_tokenizer: Any
) -> None:
    ids = hf_tokenizer.encode("a龘", add_special_tokens=False)
    pieces = run(tokenizer, ids[:-1])
    assert "".join(pieces[:-1]) == "a"
    assert set(pieces[-1]) == {REPLACEMENT}


def test_work_for_a_token_does_not_grow_with_the_answer(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    class Counting:
        longest = 0

        def decode(self, token_ids: Sequence[int]) -> str:
            self.longest = max(self.longest, len(token_ids))
            return tokenizer.decode(token_ids)

        def has_text(self, token_id: int) -> bool:
            return tokenizer.has_text(token_id)

    lead_byte = next(
        token_id
        for token_id in range(len(hf_tokenizer))
        if tokenizer.has_text(token_id) and tokenizer.decode([token_id]) == REPLACEMENT
    )
    text = hf_tokenizer.encode("hello world " * 100)
    for ids in (text, [lead_byte] * 500, [hf_tokenizer.eos_token_id] * 500):
        counting = Counting()
        detokenizer = Detokenizer(counting)
        for token_id in ids:
            detokenizer.push(token_id)
        assert counting.longest <= 40


def test_several_tokens_at_once_become_the_same_text(
    tokenizer: Tokenizer, hf_tokenizer: Any, random_text: Callable[[random.Random], str]
) -> None:
    rng = random.Random(7)
    for _ in range(150):
        ids = hf_tokenizer.encode(random_text(rng))
        prompt, generated = ids[: len(ids) // 4], ids[len(ids) // 4 :]
        single, joined = Detokenizer(tokenizer, prompt), Detokenizer(tokenizer, prompt)
        while generated:
            count = rng.choice([1, 2, 3, 8, 40])
            now, generated = generated[:count], generated[count:]
            assert joined.extend(now) == "".join(map(single.push, now))
        assert joined.flush() == single.flush()


@pytest.mark.parametrize("hf_tokenizer", ["byte_level_bpe"], indirect=True)
def test_any_token_ids_at_once_decode_exactly_with_a_byte_level_tokenizer(
    tokenizer: Tokenizer, hf_tokenizer: Any
) -> None:
    rng = random.Random(8)
    for _ in range(150):
        ids = [rng.randrange(len(hf_tokenizer) + 10) for _ in range(80)]
        detokenizer = Detokenizer(tokenizer)
        text, left = "", ids
        while left:
            count = rng.randint(1, 12)
            text, left = text + detokenizer.extend(left[:count]), left[count:]
        assert text + detokenizer.flush() == hf_tokenizer.decode(ids, skip_special_tokens=True)
