"""Judging answers: right, wrong, or somebody else's."""

from __future__ import annotations

import itertools

import pytest

from loraplex_bench.demo.tasks import TASKS, expected, make_lines
from loraplex_bench.load.answers import AnswerBook, Verdict, checkable
from loraplex_bench.load.workload import PlannedRequest

LINES = make_lines(5, 20)
TASK_NAMES = (None, *TASKS)


def test_every_leak_between_adapters_is_seen_and_attributed():
    book = AnswerBook(LINES)
    for line in LINES:
        for mine, theirs in itertools.product(TASK_NAMES, repeat=2):
            judgement = book.judge(mine, line, expected(theirs, line))
            if mine == theirs:
                assert judgement.verdict is Verdict.RIGHT
            else:
                assert judgement.verdict is Verdict.LEAK
                assert judgement.owner == (theirs or "base")


def test_the_answer_to_another_request_is_a_leak():
    judgement = AnswerBook(LINES).judge("rot13", LINES[0], expected("leet", LINES[1]))
    assert judgement.verdict is Verdict.LEAK
    assert judgement.owner == "leet on another line"


@pytest.mark.parametrize("text", ["", "something else"])
def test_nobodys_answer_is_wrong(text: str):
    assert AnswerBook(LINES).judge("rot13", LINES[0], text).verdict is Verdict.WRONG


def test_a_right_answer_cut_or_prolonged_is_wrong():
    right = expected("rot13", LINES[0])
    for text in (right[:-1], right + "x"):
        assert AnswerBook(LINES).judge("rot13", LINES[0], text).verdict is Verdict.WRONG


def test_beginnings_are_right_as_far_as_they_go():
    book, line = AnswerBook(LINES), LINES[0]
    right = expected("atbash", line)
    assert all(
        book.judge_beginning("atbash", line, right[:n]).verdict is Verdict.RIGHT for n in range(len(right))
    )
    leaked = book.judge_beginning("atbash", line, expected("caesar3", line))
    assert (leaked.verdict, leaked.owner) == (Verdict.LEAK, "caesar3")
    assert book.judge_beginning("atbash", line, "~~").verdict is Verdict.WRONG


def test_what_can_be_checked():
    def request(**changes: object) -> PlannedRequest:
        settings = {"adapters": (("rot13", 1.0),), "max_tokens": 99, "line": LINES[0], **changes}
        return PlannedRequest(index=0, at_s=0.0, prompt="x", **settings)  # type: ignore[arg-type]

    assert checkable(request())
    assert checkable(request(adapters=()))
    assert not checkable(request(line=None))
    assert not checkable(request(ignore_eos=True))
    assert not checkable(request(max_tokens=3))
    assert not checkable(request(adapters=(("mine", 1.0),)))
    assert not checkable(request(adapters=(("rot13", 0.5), ("leet", 0.5))))
