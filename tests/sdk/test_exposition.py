"""Reading a Prometheus endpoint, against what prometheus_client writes."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from loraplex.cli.exposition import parse, scrape


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("running", "Help.", registry=registry).set(3)
    swaps = Counter("swaps", "Help.", ["kind", "name"], registry=registry)
    swaps.labels("load", 'a "quoted" \\ name, {with} all\nkinds').inc(2)
    swaps.labels("copy", "b").inc(5)
    Histogram("step_seconds", "Help.", registry=registry, buckets=(0.1, 1.0)).observe(0.5)
    return registry


def test_values_sums_and_labels(registry: CollectorRegistry):
    metrics = parse(generate_latest(registry).decode())
    assert metrics.value("running") == 3
    assert metrics.value("swaps_total") == 7
    assert metrics.value("swaps_total", kind="load") == 2
    assert metrics.value("swaps_total", name='a "quoted" \\ name, {with} all\nkinds') == 2
    assert metrics.value("step_seconds_bucket", le="+Inf") == 1
    assert metrics.get("missing") is None
    with pytest.raises(LookupError, match="swaps_total kind=other"):
        metrics.value("swaps_total", kind="other")


def test_a_line_that_is_no_sample_is_an_error():
    with pytest.raises(ValueError, match="Prometheus"):
        parse("running\n")


def test_scrape_reads_a_live_endpoint(registry: CollectorRegistry):
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        assert scrape(f"127.0.0.1:{server.server_port}").value("running") == 3
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
