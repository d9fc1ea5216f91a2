"""Names and labels of the metrics."""

from __future__ import annotations

import re

from loraplex_server.core.request import AdapterUse, Request
from loraplex_server.metrics import Metrics


def finish(metrics: Metrics, *names: str, completion_tokens: int = 1) -> None:
    metrics.observe_request(
        Request("r", (1, 2), adapters=tuple(AdapterUse(name) for name in names)),
        outcome="stop",
        completion_tokens=completion_tokens,
        seconds=0.1,
        seconds_after_first_token=0.0,
        times=None,
    )


def test_names_carry_the_project_and_their_units() -> None:
    units = ("_seconds", "_bytes", "_ratio", "_tokens", "_requests", "_adapters")
    for family in Metrics().registry.collect():
        assert re.fullmatch(r"loraplex_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(units), family.name


def test_each_server_has_a_registry_of_its_own() -> None:
    first, second = Metrics(), Metrics()
    finish(first, "a")
    assert second.registry.get_sample_value("loraplex_requests_total", {"outcome": "stop"}) is None


def test_adapter_labels_are_capped() -> None:
    metrics = Metrics()
    for index in range(1200):
        finish(metrics, f"adapter-{index}")
    finish(metrics, "adapter-0", "adapter-1199")
    samples = {
        sample.labels["adapter"]: sample.value
        for family in metrics.registry.collect()
        if family.name == "loraplex_completion_tokens"
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    assert len(samples) == 1001
    assert samples["adapter-0"] == 2
    assert samples["other"] == 201


def test_names_of_requests_that_got_nothing_make_no_labels() -> None:
    metrics = Metrics()
    finish(metrics, "made-up", completion_tokens=0)
    assert (
        metrics.registry.get_sample_value("loraplex_completion_tokens_total", {"adapter": "made-up"}) is None
    )
