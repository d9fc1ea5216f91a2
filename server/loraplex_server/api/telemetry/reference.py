"""Writes docs/reference/metrics.md, every metric: `python -m loraplex_server.api.telemetry.reference`."""

from __future__ import annotations

import sys
from typing import NamedTuple

from loraplex_server.api.telemetry.catalogue import DeclaredMetric, declared_metrics
from loraplex_server.api.telemetry.gateway_metrics import GATEWAY_METRICS

_HEAD = """\
# Metrics

<!-- Written by `make reference` from the declarations in server/loraplex_server/api/telemetry. -->

`http://127.0.0.1:9400/metrics` has these for Prometheus; `--metrics-host` and `--metrics-port` move it. A
counter has `_total` at its end, and a histogram is exported as `_bucket`, `_sum` and `_count`. A metric
without a unit counts what its description names.

"""

_GATEWAY = """
## For the Kubernetes Gateway API Inference Extension

Its endpoint picker finds these gauges under the names of vLLM's metrics.

"""

_EXPORTED_END = {"Info": "_info", "Counter": "_total"}
_UNITS = ("seconds", "bytes", "tokens", "ratio")


class _Row(NamedTuple):
    """A metric as it is exported."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def unit(self) -> str:
        """The end of the name, where that is one."""
        end = self.name.removesuffix("_total").rpartition("_")[2]
        return end if end in _UNITS else ""


def page() -> str:
    """The page in Markdown."""
    own = [
        _Row(_exported(found), found.kind.__name__.lower(), found.metric.labels, found.metric.help)
        for found in declared_metrics()
    ]
    gateway = [_Row(found.name, "gauge", found.labels, found.help) for found in GATEWAY_METRICS]
    buckets = [
        f"| `{found.name}` | {', '.join(f'{bound:g}' for bound in found.metric.buckets)} |\n"
        for found in declared_metrics()
        if found.metric.buckets
    ]
    histograms = f"\n## Buckets of the histograms\n\n| name | upper bounds |\n|---|---|\n{''.join(buckets)}"
    return f"{_HEAD}{_table(own)}{histograms}{_GATEWAY}{_table(gateway)}"


def _table(rows: list[_Row]) -> str:
    head = "| name | kind | unit | labels | description |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{row.name}` | {row.kind} | {row.unit} | {', '.join(f'`{label}`' for label in row.labels)} "
        f"| {row.help} |\n"
        for row in rows
    )


def _exported(found: DeclaredMetric) -> str:
    return found.name + _EXPORTED_END.get(found.kind.__name__, "")


if __name__ == "__main__":
    sys.stdout.write(page())
