"""Checks answers of the demo model, and says whose a wrong one was."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

from loraplex_bench.demo.tasks import TASKS, expected
from loraplex_bench.load.workload import BASE, PlannedRequest


class Verdict(enum.StrEnum):
    """The judgement of an answer, in a word."""

    RIGHT = "right"
    WRONG = "wrong"
    """Nobody's right answer: the model erred, or was computed wrongly."""
    LEAK = "leak"
    """The right answer of another adapter, or to another request."""
    UNCHECKED = "unchecked"
    """No answer is known beforehand, or none was given."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A verdict; for a leak, whose answer it was, for example "leet" or "leet on another line"."""

    verdict: Verdict
    owner: str | None = None


UNCHECKED = Judgement(Verdict.UNCHECKED)
_RIGHT = Judgement(Verdict.RIGHT)
_WRONG = Judgement(Verdict.WRONG)


class AnswerBook:
    """The right answers to a set of demo lines.

    Args:
        lines: every line that is asked about, so that an answer to another request is recognised too.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._owners: dict[str, list[tuple[str, str | None]]] = {}
        for line in set(lines):
            for task in (None, *TASKS):
                self._owners.setdefault(expected(task, line), []).append((line, task))

    @classmethod
    def of(cls, requests: Iterable[PlannedRequest]) -> AnswerBook:
        return cls(request.line for request in requests if request.line is not None)

    def judge(self, task: str | None, line: str, text: str) -> Judgement:
        """Judges the whole answer `text` that the adapter `task` (None: the base) gave to `line`."""
        return self.judge_against(expected(task, line), line, text)

    def judge_against(self, right: str, line: str, text: str) -> Judgement:
        """Judges the whole answer `text` to `line` where `right` is the only right one."""
        if text == right:
            return _RIGHT
        owners = self._owners.get(text)
        if owners is None:
            return _WRONG
        here = [owner for asked, owner in owners if asked == line]
        name = (here[0] if here else owners[0][1]) or BASE
        return Judgement(Verdict.LEAK, name if here else f"{name} on another line")

    def judge_beginning(self, task: str | None, line: str, text: str) -> Judgement:
        """Judges an answer that was cut short: right so far, or not.

        A beginning that another adapter would share is counted as right: it says nothing.
        """
        if expected(task, line).startswith(text):
            return _RIGHT
        for other in (None, *TASKS):
            if expected(other, line).startswith(text):
                return Judgement(Verdict.LEAK, other or BASE)
        return _WRONG


def checkable(request: PlannedRequest) -> bool:
    """True if the request's answer is known beforehand: a demo line, one of the demo's adapters or the base,
    and generation that ends by itself."""
    if request.line is None or request.ignore_eos:
        return False
    try:
        task = request.task
    except ValueError:
        return False
    return (task is None or task in TASKS) and request.max_tokens > len(request.line)
