"""The files that operators take as they are: every name in them is one that the server has."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.config.layers import known_settings

DEPLOY = Path(__file__).parents[2] / "server/deploy"
FLAG = re.compile(r"--[a-z][a-z-]+")


def exported() -> dict[str, set[str]]:
    """Every sample's name, with the labels it may carry."""
    found: dict[str, set[str]] = {}
    metrics = Metrics()
    for collector in list(metrics.registry._collector_to_names):
        for name in metrics.registry._collector_to_names[collector]:
            found[name] = {"instance", "le", *getattr(collector, "_labelnames", ())}
    return found


def queries(node: Any) -> list[str]:
    """Every PromQL expression of a dashboard."""
    if isinstance(node, dict):
        own = [node["expr"]] if "expr" in node else []
        return own + [query for value in node.values() for query in queries(value)]
    return [query for value in node for query in queries(value)] if isinstance(node, list) else []


def test_every_query_of_the_dashboard_names_an_exported_metric() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    names = exported()
    found = queries(dashboard)
    assert len(found) > 30
    used = set()
    for query in found:
        metrics = re.findall(r"loraplex_[a-z_]+", query)
        assert metrics, query
        used |= set(metrics)
        for name in metrics:
            assert name in names, f"{name} in {query}"
        for label in re.findall(r"by \(([^)]*)\)", query):
            labels = set(label.replace(" ", "").split(","))
            assert labels <= set.union(*(names[name] for name in metrics)), query
    [variable] = [v for v in dashboard["templating"]["list"] if v["name"] == "instance"]
    assert set(re.findall(r"loraplex_[a-z_]+", variable["definition"])) <= names.keys()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_flags_of_the_unit_and_the_image_exist() -> None:
    known = {"--config", *(setting.flag for setting in known_settings().values())}
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "loraplex.service")
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[1] == "serve"
    assert {part for part in command if part.startswith("--")} <= known
    comment = (DEPLOY / "Dockerfile").read_text().partition("FROM ")[0]
    flags = set(FLAG.findall(comment.partition("loraplex \\\n")[2])) - {"--build-arg"}
    assert len(flags) >= 5
    assert flags <= known
