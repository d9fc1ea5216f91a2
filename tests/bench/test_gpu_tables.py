"""The GPU bench's tables of steps and of the server, tiny and on the CPU: what they count is right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from loraplex.cli import exposition as metrics
from loraplex_bench import gpu
from loraplex_bench.models.random_weights import RandomWeights, config_of, write
from loraplex_bench.scenarios import gpu_server
from loraplex_bench.scenarios.decode_steps import (
    StepBench,
    StepRow,
    StepTable,
    cost_of_adapters,
    goals,
    measure,
)
from loraplex_bench.scenarios.gpu_server import ServerTable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> StepBench:
    return StepBench(StepTable.tiny(), "nf4", CPU)


def test_the_floor_counts_weights_contexts_and_distinct_adapters(bench: StepBench) -> None:
    wanted, config = StepTable.tiny(), config_of("tiny")
    row = bench.measure(3, 2, bytes_per_s=1e9)
    linear = sum(p.in_features * p.out_features for p in bench.base.projections)
    head, norms = config.vocab_size * config.hidden_size * 4, (2 * 2 + 1) * config.hidden_size * 4
    assert row.weight_bytes == linear // 2 + linear // 64 * 4 + head + norms + 3 * config.hidden_size * 4
    assert row.kv_bytes == 3 * wanted.context * 2 * 2 * config.num_key_value_heads * 32 * 4
    sizes = sum(p.in_features + p.out_features for p in bench.base.projections)
    assert row.adapter_bytes == 2 * sizes * wanted.rank * 4
    assert row.floor_ms == pytest.approx((row.weight_bytes + row.kv_bytes + row.adapter_bytes) / 1e6)
    assert row.tokens_per_s == pytest.approx(3e3 / row.wall_ms)
    assert row.kernel_share is None, "no device, no kernels to time"
    assert "adapters   2" in row.line()
    assert json.loads(json.dumps(row.as_json()))["times_floor"] == pytest.approx(row.wall_ms / row.floor_ms)


def test_every_sequence_attends_to_its_own_context_and_has_its_own_adapter(bench: StepBench) -> None:
    with_adapters, without = bench.plan(3, 2), bench.plan(3, 0)
    assert with_adapters.runs == [(0, 1, ((0, 1.0),)), (1, 2, ((0, 1.0),)), (2, 3, ((1, 1.0),))]
    assert without.runs == []
    plain = bench.runner.logits(without).clone()
    changed = (bench.runner.logits(with_adapters) - plain).abs().amax(dim=1)
    assert (changed > 1e-2 * plain.abs().max()).all()
    alone = bench.runner.logits(bench.plan(1, 0))
    assert alone.shape == (1, 320)
    assert len(set(map(tuple, plain.argsort(dim=1)[:, :5].tolist()))) == 3


def test_rows_come_in_order_until_the_time_is_up() -> None:
    wanted = dataclasses.replace(StepTable.tiny(), quantizations=("int4",), kv_cache_dtype="fp8")
    rows = list(measure(wanted, CPU, limit_s=60))
    assert [(row.batch, row.adapters) for row in rows] == [(1, 0), (1, 1), (3, 0), (3, 2)]
    assert rows[-1].kv_bytes == 3 * wanted.context * 2 * 2 * 2 * 32
    assert cost_of_adapters(rows, 3, 2) == {"int4": rows[3].wall_ms / rows[2].wall_ms - 1}
    assert list(measure(wanted, CPU, limit_s=0)) == []


def test_goals_are_told_from_the_rows_that_are_there() -> None:
    row = StepRow("nf4", 64, 0, 1024, 6.0, 5.9, 5.8, True, 4.0, 1, 1, 0)
    rows = [row, dataclasses.replace(row, adapters=16, wall_ms=7.2), dataclasses.replace(row, batch=1)]
    step, kernels, cost = goals(rows)
    assert (step.value, step.met) == (1.5, True)
    assert (kernels.value, kernels.met) == (pytest.approx(5.8 / 6), True)
    assert (cost.value, cost.met) == (pytest.approx(0.2), False)
    assert cost.line().endswith("0.20, wanted at most 0.15: missed, by a factor of 1.33")
    assert (
        goals([dataclasses.replace(row, kernel_ms=5.0)])[1]
        .line()
        .endswith("wanted at least 0.95: missed, by a factor of 1.14")
    )
    peers = [
        gpu_server.ServerRow("p", w, "batch", speedup=s) for w, s in (("a", 30.0), ("b", 12.0), ("c", None))
    ]
    assert (
        gpu_server.goal_line(peers) == "server over transformers + PEFT: 12.0x, wanted at least 20x: missed"
    )
    assert gpu_server.goal_line(peers[2:]) is None


def test_random_weights_are_a_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = write(tmp_path, "tiny", 2, rank=4, dtype=torch.float32, device=CPU)
    loaded = AutoModelForCausalLM.from_pretrained(model.base).state_dict()
    drawn = dict(RandomWeights(config_of("tiny"), torch.float32, CPU).tensors())
    assert loaded.keys() == drawn.keys()
    assert all(torch.equal(loaded[name], drawn[name]) for name in drawn)
    assert sorted(path.name for path in model.adapters.iterdir()) == list(model.names)


@pytest.mark.slow
def test_the_server_is_measured_beside_transformers_and_peft(tmp_path: Path) -> None:
    assert gpu.main(["--tiny", "--only", "server", "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gpu-tiny-on-cpu.json").read_text())
    at_once, stream, peft = document["server"]["result"]["rows"]
    assert [row["system"] for row in (at_once, stream, peft)] == [
        "loraplex",
        "loraplex",
        "transformers + PEFT",
    ]
    for row in (at_once, stream, peft):
        assert row["not_run"] is None
        assert row["tokens_per_s"] > 0
        assert row["failed"] == 0
    assert 1 <= at_once["batch"] <= ServerTable.tiny().requests
    assert at_once["idle_share"] is None, "no device, no clock of its own"
    assert at_once["ttft_p99_s"] >= at_once["ttft_p50_s"] > 0
    assert peft["speedup"] == pytest.approx(at_once["tokens_per_s"] / peft["tokens_per_s"])


def test_the_devices_idle_time_is_a_share_of_what_passed_between_two_scrapes() -> None:
    def scraped(factor: int) -> metrics.Metrics:
        names = (
            "loraplex_step_requests",
            "loraplex_step_device_seconds",
            "loraplex_step_device_idle_seconds",
        )
        lines = [f"{name}_sum {factor * value}" for name, value in zip(names, (30, 3.0, 1.0), strict=True)]
        return metrics.parse("\n".join([*lines, *(f"{name}_count {factor * 10}" for name in names)]))

    found = gpu_server.steps_between(scraped(1), scraped(3))
    assert found == (3, pytest.approx(0.3), pytest.approx(0.25))


def test_both_systems_are_asked_the_same() -> None:
    wanted = ServerTable.tiny()
    model = gpu_server.BenchModel("m", Path(), Path(), ("a", "b"), 320)
    at_once, again = (gpu_server.requests(wanted, model, 0, float("inf")) for _ in range(2))
    stream = gpu_server.requests(wanted, model, 0, 5.0)
    assert at_once == again
    assert [(r.prompt, r.adapters) for r in at_once] == [(r.prompt, r.adapters) for r in stream]
    assert all(len(r.prompt) == wanted.prompt_tokens and r.ignore_eos for r in at_once)
    assert {r.adapters[0][0] for r in at_once} <= set(model.names)
