"""Samples, tables and files of results, which all benches write in one way."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the JSON that `write_json` writes."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Mean and percentiles of a sample, in the sample's unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None for no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            len(ordered),
            sum(ordered) / len(ordered),
            percentile(ordered, 50),
            percentile(ordered, 90),
            percentile(ordered, 99),
            ordered[-1],
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the nearest two of the ascending values, of which there is at least one."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a result, its format version first; creates the folder. Dataclasses become objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **document}, indent=1, default=_plain, allow_nan=False)
    path.write_text(text + "\n")


def write_result(folder: Path, kind: str, text: str, document: Mapping[str, Any]) -> Path:
    """Writes `kind-DATE-TIME.txt` and `.json` into `folder`; returns their path without the ending."""
    stem = folder / f"{kind}-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M}"
    write_json(stem.with_suffix(".json"), document)
    stem.with_suffix(".txt").write_text(text + "\n")
    return stem


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with the digits that matter."""
    value = seconds * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
