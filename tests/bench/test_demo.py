"""The demo as users run it: a real server, real adapters, every answer right."""

from __future__ import annotations

import pytest

from loraplex_bench.demo.tasks import TASKS, expected, make_lines
from loraplex_bench.load.answers import AnswerBook, Judgement, Verdict
from loraplex_bench.scenarios.demo import Answer, Lane, main


def lane(*verdicts: Verdict | None) -> Lane:
    answers = [
        Answer(str(index), text=f"t{index}", judgement=None if verdict is None else Judgement(verdict))
        for index, verdict in enumerate(verdicts)
    ]
    return Lane((("rot13", 1.0),), "rotates", TASKS["rot13"].apply, 8, answers)


def test_a_lane_shows_what_went_wrong_before_what_went_right():
    right, wrong = Verdict.RIGHT, Verdict.WRONG
    assert lane(right, wrong, right).shown.line == "1"
    assert lane(right, None, right).shown.line == "1"
    assert lane(right, right).shown.line == "1"
    assert lane(right, wrong, right).score == "2/3"
    assert not lane(right, None).done


def test_the_book_knows_what_the_demo_asks():
    line = make_lines(1, 1)[0]
    book = AnswerBook([line])
    assert book.judge(None, line, line).verdict is Verdict.RIGHT
    assert book.judge("rot13", line, expected("rot13", line)).verdict is Verdict.RIGHT


@pytest.mark.parametrize("flag", ["--adapters", "--lines", "--slots"])
def test_too_few_are_refused(flag: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([flag, "0"])
    assert flag in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_answers_right_and_stops_cleanly(capfd: pytest.CaptureFixture[str]):
    code = main([])
    out = capfd.readouterr().out
    assert code == 0, out
    assert "Ready after" in out
    assert "120 of 120 answers right" in out
    assert "tokens/s over gRPC" in out
    assert "evictions" in out
    assert "Server stopped with exit code 0." in out
