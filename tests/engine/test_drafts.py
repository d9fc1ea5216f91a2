"""Draft tokens: from where, how many, and when not."""

from __future__ import annotations

import random

from loraplex_server.engine.drafts import Drafter


def drafter(most: int = 16, limit: int = 10_000, **options: int) -> Drafter:
    made = Drafter(most, limit, **options)
    made._length = most
    return made


def draft(made: Drafter, row: list[int], most: int) -> tuple[int, ...]:
    """The next draft, where there is time enough to read."""
    made.read(row, len(row))
    return made.propose(row, most)


def looked_up(tokens: list[int], count: int, first: int = 0) -> tuple[int, ...]:
    """The plainest way: the widest end of the row that stands earlier, there the latest place."""
    for width in (4, 3, 2):
        for place in range(len(tokens) - 1, first + width - 1, -1):
            if tokens[place - width : place] == tokens[-width:]:
                row = list(tokens)
                for at in range(count):
                    row.append(row[place + at])
                return tuple(row[len(tokens) :])
    return ()


def test_what_followed_the_latest_earlier_place_is_drafted() -> None:
    row = [1, 2, 3, 50, 51, 9, 1, 2, 3, 60, 61, 62, 1, 2, 3]
    assert draft(drafter(), row, 4) == (60, 61, 62, 1)
    # A wider match goes before a later one.
    assert draft(drafter(), [7, 1, 2, 40, 1, 2, 50, 7, 1, 2], 1) == (40,)
    assert draft(drafter(), [1, 2, 3, 4], 4) == ()
    assert draft(drafter(), [1], 4) == ()


def test_a_row_that_repeats_itself_is_drafted_to_go_on() -> None:
    assert draft(drafter(), [5, 6, 7, 8, 6, 7, 8, 6, 7], 7) == (8, 6, 7, 8, 6, 7, 8)
    assert draft(drafter(), [9, 4, 4, 4], 5) == (4,) * 5


def test_drafts_are_those_of_the_plainest_way() -> None:
    rng = random.Random(3)
    for _ in range(60):
        letters, first = rng.choice([2, 3, 8]), rng.choice([0, 0, 3])
        tokens = [*(-1 - row for row in range(first))]
        made = drafter(first=first)
        for _ in range(rng.randint(1, 30)):
            tokens += rng.choices(range(letters), k=rng.randint(1, 5))
            made._resume = 0
            assert draft(made, tokens, 6) == looked_up(tokens, 6, first)


def test_a_long_prompt_is_taken_in_piece_by_piece() -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(1000) for _ in range(5000)]
    tokens += tokens[4000:4010]
    made = drafter()
    assert made.read(tokens, 1024) == 1024
    assert made.propose(tokens, 4) == ()
    assert made.due(len(tokens)), "it is not done with reading"
    assert [made.read(tokens, 1024) for _ in range(5)] == [1024, 1024, 1024, 914, 0]
    assert made.propose(tokens, 4) == tuple(tokens[4010:4014])


def test_of_a_very_long_prompt_the_end_is_looked_at() -> None:
    tokens = [*range(100, 140), *range(50_000, 82_000), *range(800, 4_000), 81_000, 81_001]
    assert draft(drafter(limit=100_000), tokens, 3) == (81_002, 81_003, 81_004)
    assert draft(drafter(limit=100_000), [*tokens, 110, 111], 3) == ()


def test_virtual_tokens_are_never_drafted() -> None:
    row = [-1, -2, -3, 4, 5, -1, -2]
    assert draft(drafter(first=3), [*row[:3], 4, 4, 5, 9, 4, 5], 3) == (9, 4, 5)
    assert draft(drafter(first=3), [*row[:3], 8, 9], 3) == ()


def test_no_draft_reaches_past_the_end() -> None:
    """After a draft of n tokens there is room for one more than them."""
    row = [1, 2] * 10
    for limit, count in ((30, 9), (24, 3), (22, 1), (21, 0), (20, 0)):
        assert len(draft(drafter(limit=limit), row, 16)) == count
        assert drafter(limit=limit).due(len(row)) == bool(count)


def test_right_drafts_grow_and_wrong_ones_shrink() -> None:
    made = Drafter(12, 10_000)
    row = [1, 2] * 50
    lengths = []
    for accepted in (4, 8, 12, 5, 6, 0):
        found = draft(made, row, 16)
        lengths.append(len(found))
        made.judge(len(found), accepted, 0)
    assert lengths == [4, 8, 12, 12, 6, 12]
    assert len(draft(made, row, 16)) == 1
    assert (made.drafted, made.accepted) == (54, 35)


def test_a_draft_cut_short_says_nothing_about_longer_ones() -> None:
    made = Drafter(16, 10_000)
    row = [1, 2] * 50
    made.judge(4, 4, 0)
    made.judge(2, 2, 0)
    assert len(draft(made, row, 16)) == 8


def test_after_drafts_in_vain_it_waits_ever_longer() -> None:
    made = Drafter(4, 10_000)
    row = [1, 2] * 100
    waits, length = [], 10
    for _ in range(7):
        made.judge(1, 0, length)
        before = length
        while not draft(made, row[:length], 4):
            length += 1
        waits.append(length - before)
    assert waits == [1, 2, 4, 8, 16, 16, 16]
    made.judge(1, 1, length)
    made.judge(1, 0, length)
    assert made.due(length + 1)


def test_where_nothing_is_found_it_waits_too() -> None:
    made = Drafter(4, 10_000)
    row = list(range(60))
    due = [length for length in range(10, 60) if made.due(length) and not draft(made, row[:length], 4)]
    assert due == [10, 11, 13, 17, 25, 41, 57]


def test_a_draft_has_to_be_worth_it() -> None:
    """With `worth` 2, a single accepted draft counts as none."""
    made = Drafter(8, 10_000, worth=2)
    row = [1, 2] * 20
    made.judge(4, 1, 30)
    assert not made.due(30)
    assert len(draft(made, row[:31], 8)) == 2
    made.judge(2, 2, 33)
    assert made.due(33)
    assert len(draft(made, row[:33], 8)) == 4
