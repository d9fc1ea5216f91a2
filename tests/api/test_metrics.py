"""Names and labels of the metrics."""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.core.errors import ErrorInfo, Reason
from loraplex_server.core.request import AdapterUse, Request
from loraplex_server.wire.messages import EngineInfo
from loraplex_server.wire.stats import Stats, StepRecord


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
        assert re.fullmatch(r"(loraplex_|vllm:)[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(units), family.name


def test_the_memory_plan_is_shown_part_by_part(engine_info: EngineInfo) -> None:
    metrics = Metrics()
    plan = (("base weights (nf4)", 900_000), ("KV cache (fp8)", 4096))
    metrics.set_info(msgspec.structs.replace(engine_info, memory=plan), "1.0")
    for part, size in plan:
        assert metrics.registry.get_sample_value("loraplex_memory_planned_bytes", {"part": part}) == size


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


def stats(**fields: Any) -> Stats:
    given: dict[str, Any] = {
        "steps": (),
        "swaps": (),
        "waiting": 2,
        "running": 3,
        "waiting_for_adapter": 1,
        "kv_blocks_used": 25,
        "kv_blocks": 100,
        "adapter_device_bytes_used": 0,
        "adapter_host_bytes_used": 0,
        "adapters_on_device": ("a", "b"),
        "adapters_on_host": ("b", "c"),
        "adapter_hits": 0,
        "adapter_misses": 0,
        "adapters_running": ("b", "a"),
        "adapters_waiting": ("c",),
    }
    return Stats(**(given | fields))


def test_a_wrong_guess_is_no_token_decoded() -> None:
    metrics = Metrics()
    step = StepRecord(0.1, 0.01, 2, 0, 10, 0, 0, drafted_tokens=8, accepted_tokens=5)
    metrics.observe_stats(stats(steps=(step, step)))
    found = {
        name: metrics.registry.get_sample_value(f"loraplex_{name}_tokens_total")
        for name in ("decode", "drafted", "accepted")
    }
    assert found == {"decode": 14, "drafted": 16, "accepted": 10}


def series(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The gateway's metrics in a scrape: name to (labels, value)."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        if family.name.startswith("vllm:"):
            found[family.name] = [(sample.labels, sample.value) for sample in family.samples]
    return found


def test_the_gateway_s_names_and_meanings(engine_info: EngineInfo) -> None:
    metrics = Metrics()
    assert not series(metrics)
    metrics.set_info(engine_info, "1")
    before_s = time.time()
    metrics.observe_stats(stats())
    found = series(metrics)
    [(labels, updated_s)] = found.pop("vllm:lora_requests_info")
    assert labels == {"max_lora": "3", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert before_s <= updated_s <= time.time()
    assert found == {
        "vllm:num_requests_waiting": [({}, 2)],
        "vllm:num_requests_running": [({}, 3)],
        "vllm:kv_cache_usage_perc": [({}, 0.25)],
        "vllm:cache_config_info": [({"block_size": "16", "num_gpu_blocks": "100"}, 1)],
        "vllm:lora_adapter_loaded": [
            ({"adapter_name": "a", "level": "gpu"}, 1),
            ({"adapter_name": "b", "level": "gpu"}, 1),
            ({"adapter_name": "c", "level": "cpu"}, 1),
        ],
        "vllm:num_gpu_loaded_lora_adapters": [({}, 2)],
        "vllm:num_cpu_loaded_lora_adapters": [({}, 2)],
        "vllm:max_gpu_lora_adapters": [({}, 3)],
    }


def test_the_gateway_sees_one_fresh_series_and_no_endless_lists(engine_info: EngineInfo) -> None:
    metrics = Metrics()
    metrics.set_info(engine_info, "1")
    metrics.observe_stats(stats())
    many = tuple(f"adapter-{index:05}" for index in range(3000))
    metrics.observe_stats(stats(adapters_running=many, adapters_waiting=(), adapters_on_host=many))
    found = series(metrics)
    [(labels, _)] = found["vllm:lora_requests_info"]
    assert labels["running_lora_adapters"].count(",") == 999
    assert labels["waiting_lora_adapters"] == ""
    assert len(found["vllm:lora_adapter_loaded"]) == 1002


def test_names_of_requests_that_got_nothing_make_no_labels() -> None:
    metrics = Metrics()
    finish(metrics, "made-up", completion_tokens=0)
    assert (
        metrics.registry.get_sample_value("loraplex_completion_tokens_total", {"adapter": "made-up"}) is None
    )


def test_errors_are_counted_by_reason_or_else_by_code() -> None:
    metrics = Metrics()
    metrics.observe_error(ErrorInfo("RESOURCE_EXHAUSTED", "", reason=Reason.DISK_FULL))
    metrics.observe_error(ErrorInfo("NOT_FOUND", ""))
    for reason in ("DISK_FULL", "NOT_FOUND"):
        assert metrics.registry.get_sample_value("loraplex_errors_total", {"reason": reason}) == 1
