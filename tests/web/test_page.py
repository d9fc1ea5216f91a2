"""The built-in page in a real browser, on a real server: what it shows is what `/metrics` says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loraplex import Client, errors
from loraplex.cli import top
from loraplex.cli.exposition import Metrics
from loraplex_bench.demo.tasks import make_lines, prompt

pytestmark = pytest.mark.web

NAMES = ("upper", "rot13", "vowelmask", "caesar3", "atbash", "leet", None)
# Looks come fast, and none is forgotten: so what is shown is what happened since the page was opened.
FAST = "?interval=0.1&window=86400"
SIZE_LIMIT = 200_000


def load(address: str, requests: int, *, seed: int = 0) -> None:
    """Requests to several adapters and the base, in turn and at once."""
    lines = make_lines(seed, requests)

    def ask(index: int) -> None:
        client.generate(prompt(lines[index]), adapter=NAMES[index % len(NAMES)], max_tokens=24)

    with Client(address) as client, ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(requests)))


def agreed(shown: dict[str, float | None], expected: dict[str, float]) -> bool:
    return all(shown[name] == pytest.approx(value, rel=1e-9) for name, value in expected.items())


def expectation(before: Metrics, after: Metrics) -> dict[str, float]:
    """The values that the page must show at rest, from two scrapes: one when it was opened, one now."""
    seen = top.view(before, after, 1.0)
    assert seen.ttft is not None
    assert seen.tpot is not None
    value = after.value
    found = {
        "running": value("loraplex_requests_running"),
        "waiting": value("loraplex_requests_waiting"),
        "returned": value("loraplex_completion_tokens_total"),
        "ttft-median": seen.ttft[0],
        "ttft-95": seen.ttft[1],
        "tpot-median": seen.tpot[0],
        "tpot-95": seen.tpot[1],
        "kv-used": value("loraplex_kv_cache_usage_ratio"),
        "kv-cached": value("loraplex_kv_cache_blocks_cached"),
        "prefix-hits": value("loraplex_prefix_cache_hits_tokens_total"),
        "swaps": value("loraplex_adapter_swap_in_seconds_count", kind="copy"),
        "evictions": value("loraplex_adapter_evictions_total", tier="device"),
        "errors": value("loraplex_errors_total"),
        "ended": value("loraplex_requests_total"),
        "restarts": value("loraplex_engine_restarts_total"),
        "failed-steps": value("loraplex_failed_steps_total"),
        "problems": value("loraplex_integrity_problems"),
    }
    for tier in ("device", "host"):
        found[f"{tier}-count"] = value("loraplex_adapters_resident", tier=tier)
        found[f"{tier}-used"] = value("loraplex_adapter_used_bytes", tier=tier)
    return found


def test_numbers_move_and_agree_with_the_metrics(server: Any, tab: Callable[..., Any]) -> None:
    before = server.metrics()
    shown = tab(server.url + FAST)
    shown.until("live")
    first = shown.values()
    load(server.address, 70)
    with Client(server.address) as client, pytest.raises(errors.NotFoundError):
        client.generate("x", adapter="nobody", max_tokens=1)

    end_s = time.monotonic() + 60
    while True:
        # The same before and after: nothing changed while the page was read.
        after = server.metrics()
        values, rows = shown.values(), shown.rows()
        expected = expectation(before, after)
        if expected == expectation(before, server.metrics()) and agreed(values, expected):
            break
        assert time.monotonic() < end_s, (values, expected)
        shown.page.wait_for_timeout(100)
    # The one that failed has ended, too.
    assert values["ended"] == (first["ended"] or 0) + 71
    assert values["errors"] == (first["errors"] or 0) + 1
    for name in ("returned", "swaps", "evictions"):
        assert values[name] > (first[name] or 0), name
    assert "NOT_FOUND" in shown.page.inner_text("#reasons")
    assert "length" in shown.page.inner_text("#outcomes")

    tokens = {
        s.labels["adapter"]: s.value for s in after.samples if s.name == "loraplex_completion_tokens_total"
    }
    assert {name: float(row["total"]) for name, row in rows.items() if row["total"] != "0"} == tokens
    levels = {
        s.labels["adapter_name"]: s.labels["level"]
        for s in after.samples
        if s.name == "vllm:lora_adapter_loaded"
    }
    assert {name: row["level"] for name, row in rows.items() if row["level"]} == levels
    assert list(levels.values()).count("gpu") == values["device-count"]

    assert shown.said == []
    assert set(shown.requested) == {server.url + FAST, server.url + "metrics"}


def test_a_step_is_taken_apart(server: Any, tab: Callable[..., Any]) -> None:
    load(server.address, 7)
    shown = tab(server.url + FAST)
    shown.until("live")
    values = shown.values()
    parts = {name: values[name] for name in ("plan", "prepare", "run", "sample", "emit")}
    assert all(seconds for seconds in parts.values()), parts
    # The forward pass is what a step is for.
    assert max(parts, key=lambda name: parts[name] or 0) == "run"
    widths = shown.page.eval_on_selector_all(
        "[data-part]", "nodes => nodes.map(node => parseFloat(node.style.width))"
    )
    assert sum(widths) == pytest.approx(100, abs=0.1)


def test_drafts_are_shown_where_there_are_any(server: Any, tab: Callable[..., Any]) -> None:
    text = "loraplex_build_info 1.0\nloraplex_drafted_tokens_total {}\nloraplex_accepted_tokens_total {}\n"
    drafted = iter([(0, 0), (0, 0), (40, 30)])
    last = [(0, 0)]

    def answer(route: Any) -> None:
        last.append(next(drafted, last[-1]))
        route.fulfill(body=text.format(*last[-1]), content_type="text/plain")

    shown = tab(server.url + FAST, lambda page: page.route("**/metrics", answer))
    shown.until("live")
    shown.page.wait_for_selector("#drafts:visible", timeout=60_000)
    assert shown.page.inner_text("#drafts") == "75% of draft tokens accepted, 30 in all"
    assert shown.said == []


def test_it_goes_on_when_the_server_was_restarted(start: Callable[..., Any], tab: Callable[..., Any]) -> None:
    server = start()
    load(server.address, 7)
    shown = tab(server.url + FAST)
    shown.until("live")
    assert shown.values()["ended"] == 7
    server.stop()
    shown.until("lost")
    assert "no answer since" in shown.page.inner_text("#state")
    again = start(metrics_port=server.metrics_port)
    shown.until("live")
    shown.page.wait_for_selector('[data-show="ended"][data-value="0"]', timeout=60_000)
    load(again.address, 7)
    shown.page.wait_for_selector('[data-show="ended"][data-value="7"]', timeout=60_000)
    rates = [shown.values()[name] for name in ("decode-rate", "prefill-rate", "step-rate", "swap-rate")]
    assert all(rate is not None and rate >= 0 for rate in rates)
    # The browser itself says that nobody answered, and nobody else says anything.
    assert all("Failed to load resource" in line for line in shown.said), shown.said
    again.stop()


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_fits_a_phone_by_day_and_by_night(
    server: Any, tab: Callable[..., Any], scheme: str, dark: bool
) -> None:
    shown = tab(server.url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    shown.until("live")
    assert shown.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colour = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3
    assert (brightness < 64) is dark


def test_names_are_text_and_the_table_is_bounded(server: Any, tab: Callable[..., Any]) -> None:
    hostile = r'<img src=x onerror="document.title=\"owned\"">'
    names = [f"adapter-{index:03}" for index in range(150)]
    text = "".join(f'vllm:lora_adapter_loaded{{adapter_name="{name}",level="cpu"}} 1.0\n' for name in names)
    escaped = hostile.replace("\\", "\\\\").replace('"', '\\"')
    text += f'vllm:lora_adapter_loaded{{adapter_name="{escaped}",level="gpu"}} 1.0\n'
    text += 'loraplex_build_info{model="a } \\"b\\" \\\\ c"} 1.0\n'

    def pretend(page: Any) -> None:
        page.route("**/metrics", lambda route: route.fulfill(body=text, content_type="text/plain"))

    shown = tab(server.url + FAST, pretend)
    shown.until("live")
    rows = list(shown.rows())
    assert rows[0] == hostile, "adapters on the device come first"
    assert len(rows) == 100
    assert shown.page.inner_text("#more") == "and 51 more"
    assert shown.page.query_selector("img") is None
    assert shown.page.title() == "loraplex"
    assert shown.page.inner_text("#model") == 'a } "b" \\ c'
    shown.page.fill("#filter", "ADAPTER-14")
    assert list(shown.rows()) == names[140:150]
    assert shown.page.inner_text("#more") == ""
    assert shown.said == []


def test_a_picture_of_a_server_at_work(server: Any, tab: Callable[..., Any], tmp_path: Path) -> None:
    """Into the file that `LORAPLEX_SCREENSHOT` names, if it does."""
    shown = tab(server.url + "?interval=0.25", viewport={"width": 1180, "height": 860}, color_scheme="light")
    shown.until("live")
    stop = threading.Event()

    def work(seed: int) -> None:
        while not stop.is_set():
            load(server.address, 84, seed=seed)
            seed += 1

    # One of them is always in the middle of its requests.
    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 1001)]
    for worker in workers:
        worker.start()
    try:
        end_s = time.monotonic() + 120
        # Until the line of tokens is long enough to be seen.
        while shown.page.evaluate("() => lines.get('tokens').filter(rate => rate > 0).length") < 60:
            assert time.monotonic() < end_s
            shown.page.wait_for_timeout(100)
        picture = shown.page.screenshot()
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < SIZE_LIMIT
    Path(os.environ.get("LORAPLEX_SCREENSHOT") or tmp_path / "page.png").write_bytes(picture)
