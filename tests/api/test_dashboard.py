"""The metrics port: the exposition, and the page beside it; `make test-web` looks at that in a browser."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import re
from typing import Any

import pytest
from prometheus_client import generate_latest

from loraplex_server.api.telemetry.dashboard.page import headers, page
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.wire.messages import EngineInfo
from loraplex_server.wire.stats import Stats

STATS = Stats(
    steps=(),
    swaps=(),
    waiting=0,
    running=0,
    waiting_for_adapter=0,
    kv_blocks_used=0,
    kv_blocks=1,
    adapter_device_bytes_used=0,
    adapter_host_bytes_used=0,
    adapters_on_device=("a",),
    adapters_on_host=(),
    adapter_hits=0,
    adapter_misses=0,
)


def ask(at: str, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(at, timeout=20)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, {key.lower(): value for key, value in response.getheaders()}, body


def test_the_port_has_the_metrics_and_the_page_and_nothing_else(serving: Any) -> None:
    async def main() -> None:
        async with serving(metrics_port=0) as server:

            async def get(path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
                return await asyncio.to_thread(ask, server.metrics_at, method, path)

            status, found, body = await get("/?interval=1")
            assert (status, body) == (200, page())
            assert found["content-type"] == "text/html; charset=utf-8"
            assert found["content-length"] == str(len(body))
            assert {key: found[key.lower()] for key, _ in headers()} == dict(headers())
            assert (await get("/", "HEAD"))[::2] == (200, b"")
            assert (await get("/", "POST"))[0] == 405
            status, found, body = await get("/metrics")
            assert status == 200
            assert found["content-type"].startswith("text/plain; version=")
            assert b"loraplex_build_info{" in body
            for path in ("/metrics/", "/page.html", "/../metrics", "/favicon.ico"):
                assert (await get(path))[0] == 404

    asyncio.run(main())


def test_only_the_pages_own_script_and_style_may_run() -> None:
    policy = dict(headers())["Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    text = page().decode()
    for element in ("script", "style"):
        [body] = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{element}-src"] == f"'sha256-{digest}'"
    # Nothing from elsewhere, and nothing that such a policy would refuse.
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]+\s(style|on\w+|src)=", text)
    assert "innerHTML" not in text


def test_the_page_reads_metrics_that_there_are(engine_info: EngineInfo) -> None:
    metrics = Metrics()
    metrics.set_info(engine_info, "1.0")
    metrics.observe_stats(STATS)
    shown = generate_latest(metrics.registry).decode()
    exported = set(re.findall(r"^# TYPE (\S+)", shown, re.MULTILINE))
    used = set()
    for name in re.findall(r"[`\"]((?:loraplex|vllm)[_:][\w${}]+)", page().decode()):
        for part in ("plan", "prepare", "run", "sample", "emit"):
            for kind in ("hits", "queries"):
                used.add(name.replace("${part}", part).replace("${kind}", kind))
    assert len(used) > 25
    assert not any("$" in name for name in used)
    for name in used:
        assert {name, re.sub("_(count|sum|bucket)$", "", name)} & exported, name


def test_every_place_that_the_script_fills_is_there() -> None:
    text = page().decode()
    markup, script = text.split("<script>")
    for kind, call in (
        ("show", r"show\(\"([\w-]+)\""),
        ("line", r"line\(\"([\w-]+)\""),
        ("bar", r"bar\(\"([\w-]+)\""),
    ):
        places = re.findall(rf'data-{kind}="([\w-]+)"', markup)
        assert len(set(places)) == len(places)
        assert set(re.findall(call, script)) <= set(places)
    for name in re.findall(r"element\(\"([\w-]+)\"\)", script):
        assert f'id="{name}"' in markup


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_scrape_does_not_wait_for_the_event_loop(host: str) -> None:
    from loraplex_server.api.telemetry.dashboard.port import MetricsPort

    port = MetricsPort(host, 0, Metrics().registry)
    try:
        address = f"[{host}]:{port.port}" if ":" in host else f"{host}:{port.port}"
        status, _, body = ask(address, "GET", "/metrics")
        assert status == 200
        assert b"loraplex_requests_running 0.0" in body
    finally:
        port.close()
