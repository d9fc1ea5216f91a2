"""Checks at the end of a bench, and the figures that show them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from loraplex.cli.exposition import Metrics

FLAT_SHARE = 0.03
FLAT_BYTES = 12 << 20
"""Memory counts as flat if its median over the last third of the run, the warm-up left out, lies above that
over the first third by no more than the larger of these, by which allocators and free lists move anyway."""


@dataclasses.dataclass(frozen=True)
class MemorySample:
    """Memory of all the server's processes, in bytes, `at_s` seconds into the soak."""

    at_s: float
    rss: int
    anonymous: int


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that must hold at the end; `detail` gives the figures."""

    name: str
    passed: bool
    detail: str


def memory_check(samples: Sequence[MemorySample], duration_s: float) -> Check:
    """Passed if anonymous memory stayed flat after a warm-up of a quarter of the run."""
    name = "memory flat"
    steady = [sample for sample in samples if sample.at_s >= duration_s / 4]
    third = len(steady) // 3
    if third < 2:
        return Check(name, not samples, "not measured: no /proc" if not samples else "too few samples")
    early = statistics.median(sample.anonymous for sample in steady[:third])
    late = statistics.median(sample.anonymous for sample in steady[-third:])
    allowed = max(early * FLAT_SHARE, FLAT_BYTES)
    slope = statistics.linear_regression([s.at_s for s in steady], [s.anonymous for s in steady]).slope
    return Check(
        name,
        late - early <= allowed,
        f"{mib(early)} -> {mib(late)} anonymous (at most +{mib(allowed)}), {mib(slope * 60)} a minute",
    )


def zero_check(name: str, metrics: Metrics, metric: str, what: str) -> Check:
    """Passed if the metric is there and 0."""
    value = metrics.get(metric)
    found = f"the server exposes no {metric}" if value is None else f"{value:g} {what}"
    return Check(name, value == 0, found)


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:.1f} MiB"
