"""The op bench's printed lines, and the JSON that it keeps of its rows."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraplex_bench.load.environment import environment
from loraplex_bench.load.results import write_json
from loraplex_bench.ops.registry import Figure, Row
from loraplex_bench.ops.timers import Ceilings

_NOT_RUN = "  not run: "


class Printer:
    """Prints rows as they come; why a contender does not run is said once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, row: Row, best: int = 0) -> None:
        for line in lines(row, best):
            if line not in self._told:
                print(line, flush=True)
            if line.startswith(_NOT_RUN):
                self._told.add(line)


def lines(row: Row, best: int = 0) -> Iterator[str]:
    """One line where there is one own contender, else a line for the peers and one for each own; then what
    did not run.

    `best`: so many own contenders, the fastest first; 0 for all, in their order.
    """
    own, peers, parts = (row.of_role(role) for role in ("own", "peer", "part"))
    if best:
        own = sorted(own, key=lambda figure: figure.us or math.inf)[:best]
    head = f"{row.op:16} {row.case:46} "
    if len(own) == 1:
        beside = [f"{_alone(peer)} ({_ratio(row, own[0], peer)})" for peer in peers]
        beside += [_alone(part) for part in parts]
        yield head + "; ".join(filter(None, (_in_full(own[0]), ", ".join(beside))))
    else:
        yield head + ", ".join(map(_alone, (*peers, *parts)))
        for figure in own:
            ratios = ", ".join(f"{_ratio(row, figure, peer)} {peer.contender}" for peer in peers)
            yield "  " + "; ".join(filter(None, (_in_full(figure), ratios)))
    for figure in row.figures:
        if figure.not_run is not None:
            yield f"{_NOT_RUN}{figure.contender}: {figure.not_run}"


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Geometric means of the ratios to each peer by group of cases, and the largest share of the roofline."""
    found: dict[str, list[float]] = {}
    shares: dict[str, float] = {}
    for row in rows:
        for own in row.of_role("own"):
            name = own.contender
            if own.roofline is not None:
                label = f"{name}, largest share of the roofline"
                shares[label] = max(own.roofline, shares.get(label, 0.0))
            for peer in row.of_role("peer"):
                if (ratio := row.speedup(name, peer.contender)) is not None:
                    label = ", ".join(filter(None, (f"{name} over {peer.contender}", row.group)))
                    found.setdefault(label, []).append(ratio)
    means = {label: math.exp(sum(map(math.log, ratios)) / len(ratios)) for label, ratios in found.items()}
    return means | shares


def as_json(row: Row) -> dict[str, Any]:
    """A row with what follows from it."""
    ratios = {
        own.contender: {
            peer.contender: row.speedup(own.contender, peer.contender) for peer in row.of_role("peer")
        }
        for own in row.of_role("own")
    }
    return {**dataclasses.asdict(row), "speedup": ratios}


def from_json(found: dict[str, Any]) -> Row:
    """The row that `as_json` was given."""
    figures = tuple(Figure(**figure) for figure in found["figures"])
    return Row(found["op"], found["case"], found["group"], found["values"], figures)


def section(rows: Sequence[Row], ceilings: Ceilings) -> dict[str, Any]:
    """The rows of an op, for the document."""
    return {
        "ceilings": dataclasses.asdict(ceilings),
        "rows": [as_json(row) for row in rows],
        "summary": summary(rows),
    }


class Document:
    """The JSON on disk: sections of this run, and those of earlier ones on the same card."""

    def __init__(self, folder: Path, card: str) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        self.path = folder / f"gpu-{name}.json"
        self._sections: dict[str, Any] = {}
        if self.path.exists():
            self._sections = json.loads(self.path.read_text())

    def write(self, section: str, content: object) -> None:
        """Replaces a section, and writes all."""
        self._sections |= {section: {"environment": environment(), "result": content}}
        write_json(self.path, self._sections)


def _alone(figure: Figure) -> str:
    note = f" [{figure.note}]" if figure.note else ""
    return f"{figure.contender}{note} {figure.us:.1f} us"


def _in_full(figure: Figure) -> str:
    share = "" if figure.roofline is None else f", {figure.roofline:.0%} of the roofline"
    return f"{_alone(figure)} (least {figure.least_us:.1f}){share}"


def _ratio(row: Row, own: Figure, peer: Figure) -> str:
    return f"{row.speedup(own.contender, peer.contender) or math.nan:.2f}x"
