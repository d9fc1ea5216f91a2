"""`loraplex top`: rates and percentiles from two scrapes, and the screen they make."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import generate_latest

from loraplex.cli import top
from loraplex.cli.exposition import parse
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.core.adapter_status import SwapRecord
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import AdapterUse, Request
from loraplex_server.wire.messages import EngineInfo
from loraplex_server.wire.stats import Stats, StepRecord

INFO = EngineInfo(
    model="tiny",
    architecture="LlamaForCausalLM",
    quantization="nf4",
    dtype="float32",
    device="cpu",
    kernels="torch",
    vocab_size=100,
    max_model_len=256,
    parameters=1,
    weight_bytes=1,
    weight_checksum="",
    max_batch_tokens=512,
    max_num_requests=64,
    kv_block_size=16,
    kv_blocks=100,
    adapter_device_bytes=4 << 20,
    adapter_host_bytes=8 << 20,
    max_adapters_on_device=0,
    adapter_slots=3,
    eos_token_ids=(1,),
)


@pytest.fixture
def metrics() -> Metrics:
    """A server's real metrics, before anything happened."""
    found = Metrics()
    found.set_info(INFO, "1.0")
    return found


def work(metrics: Metrics) -> None:
    """Two seconds of it: steps, swaps and answers."""
    metrics.observe_stats(
        Stats(
            steps=tuple(StepRecord(0.01, 0.001, 4, 30, 3, 2, 0, run_seconds=0.008) for _ in range(10)),
            swaps=(SwapRecord("copy", "sql", 0.002, 3 << 20), SwapRecord("evict_device", "old", 0.0, 1)),
            waiting=5,
            running=3,
            waiting_for_adapter=2,
            kv_blocks_used=25,
            kv_blocks=100,
            adapter_device_bytes_used=1 << 20,
            adapter_host_bytes_used=2 << 20,
            adapters_on_device=("sql",),
            adapters_on_host=("sql", "old"),
            adapter_hits=9,
            adapter_misses=1,
            prefix_queries=80,
            prefix_hits=60,
        )
    )
    metrics.observe_error(ErrorInfo("NOT_FOUND", "", reason="ADAPTER_NOT_FOUND"))
    for name, tokens in (("sql", 20), ("polite", 40)):
        metrics.observe_first_token(0.02)
        metrics.observe_request(
            Request("r", (1, 2), adapters=(AdapterUse(name),)),
            outcome="length",
            completion_tokens=tokens,
            seconds=0.5,
            seconds_after_first_token=0.4,
            times=None,
        )


def test_rates_are_between_the_two_looks(metrics: Metrics) -> None:
    work(metrics)
    before = parse(generate_latest(metrics.registry).decode())
    work(metrics)
    after = parse(generate_latest(metrics.registry).decode())
    seen = top.view(before, after, 2.0)
    assert seen.model == "tiny · nf4 · float32 · cpu · torch"
    assert (seen.running, seen.waiting, seen.waiting_for_adapter) == (3, 5, 2)
    assert (seen.steps, seen.batch, seen.prefill, seen.decode) == (5.0, 4.0, 150.0, 15.0)
    assert seen.step_s == pytest.approx(0.01)
    assert (seen.hits, seen.misses, seen.swap_ins, seen.evictions) == (4.5, 0.5, 0.5, 0.5)
    assert seen.swap_bytes == 1.5 * 2**20
    assert seen.prefix_share == 0.75
    assert seen.tiers["device"] == top.Tier(1, 1 << 20, 4 << 20)
    assert seen.tiers["host"] == top.Tier(2, 2 << 20, 8 << 20)
    assert dict(seen.ended) == {"length": 1.0}
    assert dict(seen.errors) == {"ADAPTER_NOT_FOUND": 0.5}
    assert seen.parts["run"] == pytest.approx(0.008)
    assert seen.parts["emit"] == 0.0
    assert seen.busiest == [("polite", 20.0), ("sql", 10.0)]
    # All in the bucket from 10 to 25 ms: half of it, and 95% of it.
    assert seen.ttft == pytest.approx((0.01 + 0.015 * 0.5, 0.01 + 0.015 * 0.95))


def test_where_nothing_happened(metrics: Metrics) -> None:
    work(metrics)
    same = parse(generate_latest(metrics.registry).decode())
    seen = top.view(same, same, 1.0)
    assert (seen.steps, seen.batch, seen.step_s) == (0.0, 0.0, 0.0)
    assert seen.ttft is seen.prefix_share is None
    assert not seen.busiest


@pytest.fixture
def served(metrics: Metrics) -> Iterator[str]:
    """An address at which work goes on between any two looks."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            work(metrics)
            body = generate_latest(metrics.registry)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_once(served: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert top.main(["--metrics", served, "--interval", "0.05", "--once"]) == 0
    text = capsys.readouterr().out
    for part in (
        "loraplex tiny",
        "3 running, 5 waiting",
        "2 for an adapter",
        "4.0 requests each",
        "of 4 MiB",
        "90%",
        "polite",
    ):
        assert part in text, text


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert top.main(["--metrics", "127.0.0.1:1", "--once"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_another_s_metrics(served: str) -> None:
    with pytest.raises(LookupError, match="loraplex_requests_waiting"):
        top.view(parse("a 1"), parse("a 2"), 1.0)
