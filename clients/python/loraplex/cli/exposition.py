"""Reads a server's Prometheus endpoint: the text format, as far as the harness needs it, without a
dependency."""

from __future__ import annotations

import dataclasses
import re
import urllib.request
from collections.abc import Mapping

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?$")
_LABEL = re.compile(r'(?P<name>[a-zA-Z_]\w*)="(?P<value>(?:[^"\\]|\\.)*)"')
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line of an exposition."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclasses.dataclass(frozen=True)
class Metrics:
    """All samples of one scrape."""

    samples: tuple[Sample, ...]

    def get(self, name: str, /, **labels: str) -> float | None:
        """Sum over the samples of that name that carry these labels; None if there is none."""
        values = [
            sample.value
            for sample in self.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        ]
        return sum(values) if values else None

    def value(self, name: str, /, **labels: str) -> float:
        """As `get`. Raises `LookupError` if there is no such sample."""
        found = self.get(name, **labels)
        if found is None:
            wanted = "".join(f" {key}={value}" for key, value in labels.items())
            raise LookupError(f"the server exposes no metric {name}{wanted}")
        return found


def parse(text: str) -> Metrics:
    """Raises `ValueError` for a line that is neither comment nor sample."""
    samples = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        if match is None:
            raise ValueError(f"not a line of the Prometheus text format: {line!r}")
        labels = {
            label["name"]: re.sub(r'\\[\\"n]', lambda escape: _ESCAPES[escape[0]], label["value"])
            for label in _LABEL.finditer(match["labels"] or "")
        }
        samples.append(Sample(match["name"], labels, float(match["value"])))
    return Metrics(tuple(samples))


def scrape(address: str, timeout_s: float = 5.0) -> Metrics:
    """Metrics of the server at HOST:PORT. Raises `OSError` if it does not answer."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout_s) as response:
        return parse(response.read().decode())
