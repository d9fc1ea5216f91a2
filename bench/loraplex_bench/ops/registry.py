"""The op bench's one loop: an op, its cases, and for each case the contenders that carry it out.

A file of this folder declares each op: which cases, and how a case is prepared. What is the same for all is
here: every contender's result is compared with the reference before it is timed, a contender that cannot run
says why, and a row has the time of each, its share of the roofline, and the ratios between them.

The roofline is the time in which the device moves a contender's fewest bytes, or does its operations, at the
rates that a large copy and a large matrix product reach on the same device. Contenders are cold: a pass goes
over so many copies of what is read that none is in the cache when its turn comes again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from loraplex_bench.ops.timers import (
    REPEATS,
    Call,
    Ceilings,
    Clock,
    Sample,
    measure_ceilings,
    sample_graph,
    sample_in_turns,
)

TOLERANCE = 2e-2
"""A result further from the reference than this (of its norm) is wrong; bf16 rounds to 0.4%."""

MAX_COPIES = 512

Results = Sequence[Tensor]
Built = TypeVar("Built")


class UnavailableError(Exception):
    """A contender does not run; the text says why."""


@dataclass(frozen=True)
class Setting:
    """The device and the way in which contenders are timed.

    Attributes:
        dtype: of activations.
        cold_bytes: what lies between two uses of one thing: several times a GPU's second-level cache, or
            a CPU's share of its last. 0 for trying the bench out.
        clock: seconds; a CPU's only.
    """

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype | None = None
    cold_bytes: int = 256 << 20
    repeats: int = REPEATS
    clock: Clock = time.perf_counter

    @classmethod
    def of(cls, device: torch.device, **changes: Any) -> Setting:
        """The usual setting for a device."""
        cuda = device.type == "cuda"
        usual = {
            "dtype": torch.bfloat16 if cuda else torch.float32,
            "cold_bytes": (256 if cuda else 64) << 20,
        }
        return cls(device, **{**usual, **changes})

    @classmethod
    def dry(cls) -> Setting:
        """Everything once, on a CPU."""
        return cls(torch.device("cpu"), torch.float32, cold_bytes=0, repeats=1)

    def copies(self, num_bytes: float) -> int:
        """The number of copies that keep something of `num_bytes` cold; 2 at least."""
        return max(2, min(MAX_COPIES, -(-self.cold_bytes // max(int(num_bytes), 1))))


@dataclass(frozen=True)
class Contender:
    """One way to carry out a case.

    Attributes:
        calls: makes the pass that is timed ready.
        results: what one call gives from the case's inputs, which are left as they are.
        reference: what it should give; None where nothing is to be compared.
        least_bytes, flops: of one call, for the roofline; 0 for none.
        role: "own" is this project's, "peer" what it is compared with, "part" of the own one something else
            that the step needs.
        note: a version or a plan, for the table.
    """

    name: str
    calls: Callable[[], Sequence[Call]]
    results: Callable[[], Results] | None = None
    reference: Callable[[], Results] | None = None
    least_bytes: float = 0.0
    flops: float = 0.0
    role: Literal["own", "peer", "part"] = "peer"
    note: str = ""


@dataclass(frozen=True)
class Op:
    """An operation, its cases, and its contenders.

    Attributes:
        cases: by type of device, the most wanted first; a device that is not there has no such op. A case is
            a dataclass whose `str` names it.
        tiny: cases for trying the bench out.
        prepare: a case's contenders, with its inputs.
        group: what a case is summed up with.
        best: shows so many own contenders of a row, the fastest first; 0 for all.
    """

    name: str
    cases: Mapping[str, Callable[[], Sequence[Any]]]
    tiny: Sequence[Any]
    prepare: Callable[[Any, Setting], Iterable[Contender]]
    group: Callable[[Any], str] = lambda case: ""
    best: int = 0


@dataclass(frozen=True)
class Figure:
    """One contender's time, or why there is none.

    Attributes:
        us, least_us: median and least time of one call.
        roofline: share of the time that the least bytes or operations need.
        error: of the result, as a share of the reference's norm.
    """

    contender: str
    role: str
    us: float | None = None
    least_us: float | None = None
    roofline: float | None = None
    error: float | None = None
    note: str = ""
    not_run: str | None = None


@dataclass(frozen=True)
class Row:
    """One case. `values` are the fields of the case."""

    op: str
    case: str
    group: str
    values: dict[str, Any]
    figures: tuple[Figure, ...] = field(default=())

    def us(self, contender: str) -> float | None:
        return next((figure.us for figure in self.figures if figure.contender == contender), None)

    def of_role(self, role: str) -> list[Figure]:
        """Those that ran."""
        return [figure for figure in self.figures if figure.role == role and figure.us is not None]

    def speedup(self, own: str, peer: str) -> float | None:
        """`own` is so many times as fast as `peer`; None where one did not run."""
        ours, theirs = self.us(own), self.us(peer)
        return theirs / ours if ours and theirs else None


def rows(op: Op, cases: Sequence[Any], setting: Setting, ceilings: Ceilings, limit_s: float) -> Iterator[Row]:
    """Rows in the order of `cases`, each as soon as it is there; none is begun after `limit_s` seconds."""
    end_s = time.monotonic() + limit_s
    for case in cases:
        if time.monotonic() > end_s:
            return
        yield measure(op, case, setting, ceilings)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(op: Op, case: Any, setting: Setting, ceilings: Ceilings) -> Row:
    """One row: every contender is checked, and those that are right are timed."""
    figures: dict[str, Figure] = {}
    samples: dict[str, Sample] = {}
    passes: dict[str, Sequence[Call]] = {}
    contenders = {contender.name: contender for contender in op.prepare(case, setting)}
    for name, contender in contenders.items():
        figure = Figure(name, contender.role, note=contender.note)
        try:
            figure = dataclasses.replace(figure, error=error_of(contender))
            if figure.error is not None and not figure.error <= TOLERANCE:
                raise UnavailableError("the result is wrong")
            calls = contender.calls()
            if setting.device.type == "cuda":
                samples[name] = sample_graph(calls, setting.repeats)
            else:
                passes[name] = calls
        except Exception as problem:
            # Whatever a compiler or another project raises costs its own figure alone.
            figure = dataclasses.replace(figure, not_run=reason(problem))
        figures[name] = figure
    samples |= sample_in_turns(passes, setting.repeats, setting.clock)
    for name, sample in samples.items():
        contender = contenders[name]
        floor_us = ceilings.floor_us(contender.least_bytes, contender.flops)
        figures[name] = dataclasses.replace(
            figures[name],
            us=sample.median_us,
            least_us=sample.least_us,
            roofline=floor_us / sample.median_us if floor_us else None,
        )
    return Row(op.name, str(case), op.group(case), dataclasses.asdict(case), tuple(figures.values()))


def error_of(contender: Contender) -> float | None:
    """The largest error of a contender's results; None where there is nothing to compare."""
    if contender.results is None or contender.reference is None:
        return None
    return largest_error(contender.results(), contender.reference())


def largest_error(found: Results, wanted: Results) -> float:
    """The norm of the difference as a share of the norm of what is wanted, of the tensor that is furthest."""
    return max(
        float((ours.double() - truth.double()).norm() / truth.double().norm())
        for ours, truth in zip(found, wanted, strict=True)
    )


def unavailable(name: str, problem: Exception, role: Literal["own", "peer"] = "peer") -> Contender:
    """A contender that only says why it does not run."""

    def calls() -> Sequence[Call]:
        raise problem

    return Contender(name, calls, role=role)


def reason(problem: Exception) -> str:
    """For the table: what an error says in its first line."""
    text = (str(problem) or "no reason given").splitlines()[0][:200]
    return text if isinstance(problem, UnavailableError) else f"{type(problem).__name__}: {text}"


class Last(Generic[Built]):
    """Keeps what was built for the last key: cases in a row share what is dear to make, and large."""

    def __init__(self, build: Callable[..., Built]) -> None:
        self._build = build
        self._held: tuple[tuple[Any, ...], Built] | None = None

    def __call__(self, *key: Any) -> Built:
        if self._held is None or self._held[0] != key:
            self._held = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._held = key, self._build(*key)
        return self._held[1]


def dry_run(ops: Iterable[Op]) -> Iterator[Row]:
    """All ops and their tiny cases with all contenders that a CPU has."""
    setting = Setting.dry()
    ceilings = measure_ceilings(setting.device)
    for op in ops:
        yield from rows(op, op.tiny, setting, ceilings, float("inf"))
