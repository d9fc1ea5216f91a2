"""The state that all of a soak's actors share: the server under test, the requests, and the events."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from loraplex import AsyncClient, LoraplexError
from loraplex_bench.load.answers import AnswerBook, Judgement, Verdict
from loraplex_bench.load.launcher import LaunchedServer
from loraplex_bench.scenarios.checks import MemorySample

LINES_PER_ADAPTER = 24
"""Lines that each adapter is asked about, again and again; each is screened before the soak begins."""

MIN_SCREENED = 0.99
"""Least fraction of lines that an adapter, alone on the server, must answer right."""

CHANGING = "changing"
"""Name of the adapter that is replaced in place; what it does changes with its version."""

CHANGING_SHARE = 0.1
"""Part of the callers' requests that go to it."""

AUDIT_INTERVAL_S = 6.0
"""An idle engine that has something to audit does so within this time."""


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """Settings of a soak.

    Attributes:
        duration_s: of the load itself; start, screening and the look afterwards come on top.
        adapters: how many of the demo's are served from the start; the others are loaded at run time.
        slots: most adapters on the device at once.
        concurrency: callers, each with one request at a time.
        zipf: exponent of the adapters' popularity.
        crash_interval_s: mean time between two client processes killed in mid-stream.
    """

    duration_s: float = 300.0
    adapters: int = 12
    slots: int = 3
    concurrency: int = 24
    zipf: float = 1.0
    crash_interval_s: float = 5.0
    quantization: str = "nf4"
    seed: int = 0


@dataclasses.dataclass
class Version:
    """A version of the adapter that changes: what it does, when it may have begun to, and when it no longer
    may, by the clock of the soak's own process."""

    task: str
    from_s: float
    until_s: float = math.inf


def possible_tasks(versions: Sequence[Version], begin_s: float, end_s: float) -> list[str]:
    """The tasks that a request sent at `begin_s` and answered at `end_s` may have met."""
    return [one.task for one in versions if one.from_s <= end_s and one.until_s >= begin_s]


@dataclasses.dataclass
class Soak:
    """One soak of a server that is up.

    Attributes:
        served, spare: adapters that are served from the start, and folders of those loaded at run time.
        events: what happened, counted by kind; `faults`: what should not have, in words.
        lines: those that each adapter answers right when alone; None: the base.
        versions: of the adapter that changes.
        deadline_s: when the actors stop, by `time.monotonic`.
    """

    config: SoakConfig
    server: LaunchedServer
    client: AsyncClient
    served: list[str]
    spare: list[Path]
    events: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    memory: list[MemorySample] = dataclasses.field(default_factory=list)
    lines: dict[str | None, list[str]] = dataclasses.field(default_factory=dict)
    versions: list[Version] = dataclasses.field(default_factory=list)
    book: AnswerBook = dataclasses.field(default_factory=lambda: AnswerBook(()))
    deadline_s: float = 0.0

    def judged(self, task: str | None, line: str, text: str, judgement: Judgement) -> None:
        """Counts an answer; one that is not right is a fault."""
        self.events[f"answers: {judgement.verdict}"] += 1
        if judgement.verdict is not Verdict.RIGHT:
            owner = f" (that of {judgement.owner})" if judgement.owner else ""
            self.faults.append(f"{task or 'base'}: {line!r} -> {text!r}, {judgement.verdict}{owner}")

    def fault(self, text: str, event: str) -> None:
        """Something that should not have happened, counted as `event`."""
        self.faults.append(text)
        self.events[event] += 1

    async def must_fail(self, call: Awaitable[Any], error_class: type[LoraplexError], what: str) -> None:
        """Awaits a call that is to be refused."""
        try:
            await call
        except error_class:
            self.events["impossible requests refused"] += 1
        except LoraplexError as error:
            self.fault(f"{what}: {error.code} instead of {error_class.default_code}", f"errors: {what}")
        else:
            self.fault(f"{what}: accepted", f"errors: {what}")

    def running(self) -> bool:
        """True while there is time left."""
        return time.monotonic() < self.deadline_s

    async def pause(self, seconds: float) -> None:
        """Sleeps, but not past the end."""
        await asyncio.sleep(max(0.0, min(seconds, self.deadline_s - time.monotonic())))
