"""The memory plan: its bytes are those that are allocated, and what does not fit is refused beforehand."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_bench.demo.tasks import data_dir
from loraplex_kernels import dispatch
from loraplex_kernels.attention import LayerShape
from loraplex_kernels.pool import LoraPool
from loraplex_server.config import AdapterConfig, EngineConfig, ModelConfig, SchedulerConfig
from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.core.step import StepPlan
from loraplex_server.engine.build import build_engine
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.load import loader
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.plan import memory, workspace
from loraplex_server.model.plan.available import available_bytes
from loraplex_server.model.plan.live_bytes import LiveBytes
from loraplex_server.model.run import scoring
from loraplex_server.model.run.graphs import DecodeGraphs, GraphLimits
from loraplex_server.model.run.sampler import sample

FORMATS: dict[str, dict[str, Any]] = {
    "none": {"quantization": "none"},
    "none-bf16": {"quantization": "none", "dtype": "bfloat16"},
    "nf4": {"quantization": "nf4"},
    "nf4-double": {"quantization": "nf4", "double_quant": True},
    "int4": {"quantization": "int4"},
    "int4-packed": {"quantization": "int4", "dtype": "auto"},
}


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Gemma2", "Phi3"])
@pytest.mark.parametrize("form", FORMATS)
def test_weights_take_what_was_planned(tiny: Callable[[str], Any], architecture: str, form: str) -> None:
    config = ModelConfig(str(tiny(architecture).base), **{"dtype": "float32", "threads": 1, **FORMATS[form]})
    empty, checkpoint = loader.prepare(config)
    planned = empty.weight_bytes
    base = empty.fill(checkpoint, progress=False)
    assert planned == base.weight_bytes + sum(buffer.nbytes for buffer in base.model.buffers())


@pytest.mark.parametrize(
    "shapes", [[(96, 128)], [(128, 256), (32, 256), (32, 256)], [(48, 64), (16, 64)], [(64, 96)]]
)
@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int4", "none"])
def test_weights_arranged_for_triton_take_what_was_planned(
    monkeypatch: pytest.MonkeyPatch, quantization: str, shapes: list[tuple[int, int]]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name, _, double = quantization.partition("-")
    form = WeightFormat(name, torch.bfloat16, torch.device("cpu"), double_quant=bool(double))
    with dispatch.using("triton"):
        planned = form.planned_bytes(shapes)
        held = form.freeze([torch.randn(shape) for shape in shapes])
    assert planned == sum(tensor.nbytes for weight in held for tensor in weight.tensors().values())


@pytest.mark.parametrize("adapters", [{}, {"device_dtype": "int8", "max_on_device": 3}])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_running_engine_takes_what_was_planned(
    tiny: Callable[[str], Any], adapters: dict[str, Any], cache: str
) -> None:
    config = EngineConfig(
        ModelConfig(str(tiny("Llama").base), quantization="nf4", dtype="float32", threads=1),
        SchedulerConfig(max_batch_tokens=40, kv_cache_dtype=cache, kv_cache_bytes=300_000),
        AdapterConfig(device_bytes=(1 << 20) + 3, **adapters),
    )
    engine = build_engine(config, lambda client, message: None, progress=False)
    planned = dict(engine.info.memory)
    runner: Any = engine._runner
    pool = engine.adapters.pool
    assert planned["adapters"] == pool.arena.nbytes <= (1 << 20) + 3
    assert planned["adapter tables"] == sum(t.nbytes for t in (pool.a_offset, pool.b_offset, pool.rank))
    segments = (runner._segments, runner._sampled_segments)
    assert planned["adapter segments"] == sum(buffers.nbytes for buffers in segments)
    cache_bytes = sum(tensor.nbytes for tensor in runner._kv_caches)
    assert planned[f"KV cache ({'fp8' if cache == 'fp8' else 'float32'})"] == cache_bytes
    assert cache_bytes == engine.info.kv_blocks * 2 * 2 * 16 * 2 * 16 * (1 if cache == "fp8" else 4)
    engine.adapters.close()


def _prefill(tokens: int, samples: int, **sampling: Any) -> StepPlan:
    """One prompt of `tokens` tokens, sampled at the last `samples` of them."""
    ints, floats = np.zeros(0, np.int64), np.zeros(0)
    return StepPlan(
        token_ids=np.arange(tokens) % 200,
        positions=np.arange(tokens),
        slot_mapping=np.arange(tokens),
        query_start=np.array([0, tokens]),
        context_len=np.array([tokens]),
        block_start=np.array([0, -(-tokens // 16)]),
        blocks=np.arange(-(-tokens // 16)),
        run_start=ints,
        run_end=ints,
        run_pair_start=np.zeros(1, np.int64),
        pair_slot=ints,
        pair_weight=floats,
        sample_row=np.arange(tokens - samples, tokens),
        temperature=np.full(samples, sampling.get("temperature", 0.0)),
        top_k=np.full(samples, 7),
        top_p=np.full(samples, 0.9),
        uniform=np.full(samples, 0.5),
        num_logprobs=np.full(samples, sampling.get("logprobs", -1)),
        banned_start=np.arange(samples + 1),
        banned_ids=np.full(samples, 5),
    )


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Phi3"])
def test_a_step_takes_no_more_than_was_planned(tiny: Callable[[str], Any], architecture: str) -> None:
    config = EngineConfig(
        ModelConfig(str(tiny(architecture).base), quantization="none", dtype="float32", threads=1),
        SchedulerConfig(max_batch_tokens=64, max_num_requests=8, kv_cache_bytes=1 << 20),
        AdapterConfig(device_bytes=1 << 20, max_per_request=1),
    )
    empty, _ = loader.prepare(config.model)
    planned = workspace.step_bytes(empty, workspace.StepSize(64, 8, 64, 16))
    engine = build_engine(config, lambda client, message: None, progress=False)
    with LiveBytes() as found:
        engine._runner.run(_prefill(64, 8))
    engine.adapters.close()
    print(f"\n{architecture}: planned {planned}, a prefill of 64 tokens without adapters took {found.peak}")
    assert found.peak <= planned <= 8 * found.peak


def test_where_the_model_cannot_run_without_values_the_step_is_estimated(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, _ = loader.prepare(ModelConfig(str(tiny("Llama").base), quantization="none", threads=1))
    size = workspace.StepSize(64, 8, 64, 16)
    traced = workspace.step_bytes(empty, size)

    def looks_at_its_input(*_: object, **__: object) -> None:
        torch.empty(1, device="meta").item()

    monkeypatch.setattr(type(empty.model.model.rotary_emb), "forward", looks_at_its_input)
    assert traced / 2 <= workspace.step_bytes(empty, size) <= traced * 4


def test_the_inputs_of_recorded_decode_steps_take_no_more_than_was_planned(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sizes, max_rank, slots = (1, 4, 16), 16, 3
    limits = GraphLimits(sizes, 16, num_blocks=32, max_blocks_per_sequence=8, max_pairs_per_token=2)
    with dispatch.using("triton"):
        empty, _ = loader.prepare(ModelConfig(str(tiny("Llama").base), quantization="none", dtype="float32"))
        step = workspace.StepSize(16, 1, limits.pairs(16), max_rank)
        planned = workspace.graph_bytes(empty, limits, max_rank, slots) - workspace.step_bytes(empty, step)
        pool = LoraPool.allocate(
            num_elements=16, num_slots=slots, num_entries=14, dtype=torch.float32, device="cpu"
        )
        shape = LayerShape(4, 2, 16, torch.float32)
        with LiveBytes() as found:
            graphs = DecodeGraphs(lambda *_: torch.empty(0), pool, [shape], limits, torch.device("cpu"))
    assert graphs is not None
    logits = 16 * 211 * 4
    assert 0 < found.live + logits <= planned - len(sizes) * 2 * workspace._GRAPH_BYTES


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0.7, "logprobs": 3}])
def test_the_sampler_takes_no_more_than_was_planned(sampling: dict[str, Any]) -> None:
    logits = torch.randn(8, 4096)
    with LiveBytes() as found:
        sample(logits, _prefill(8, 8, **sampling))
    print(f"\n{sampling}: {found.peak / logits.numel():.1f} bytes a logit")
    assert found.peak <= logits.numel() * workspace.SAMPLER_BYTES


def test_scoring_takes_no_more_than_was_planned() -> None:
    logits = torch.randn(40, 4096).bfloat16()
    columns = {"score_row": np.arange(40), "score_id": np.arange(40), "score_top": np.full(40, 20)}
    with LiveBytes() as found:
        scoring.launch(logits, dataclasses.replace(_prefill(40, 1), **columns))
    print(f"\n{found.peak / (scoring.PIECE_ROWS * logits.shape[1]):.1f} bytes a logit of a piece")
    assert found.peak <= scoring.PIECE_ROWS * logits.shape[1] * scoring.SCORING_BYTES


def test_live_bytes_counts_storages_once_and_forgets_them() -> None:
    with LiveBytes() as found:
        first = torch.empty(1024)
        second = first + 1
        view = second.view(32, 32)[0]
        first.add_(1)
        del second
        assert found.live == 2 * 4096
        del view
        assert found.live == 4096
    assert found.peak == 2 * 4096


def test_room_is_looked_for_before_anything_is_allocated(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmptyModel, "fill", lambda *_, **__: pytest.fail("loaded all the same"))
    model = ModelConfig(str(tiny("Llama").base), quantization="nf4", dtype="float32", threads=1)

    def refusal(**adapters: Any) -> str:
        config = EngineConfig(model, SchedulerConfig(), AdapterConfig(**adapters))
        with pytest.raises(FailedPreconditionError) as caught:
            build_engine(config, lambda client, message: None, progress=False)
        return str(caught.value)

    monkeypatch.setattr(memory, "available_bytes", lambda: 100 << 20)
    text = refusal(device_bytes=96 << 20)
    assert f"{96 << 20} B" in text
    assert "104857600 B" in text
    assert "--adapter-device-bytes" in text
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 20)
    assert "the least KV cache is 16384 bytes" in refusal(device_bytes=1 << 20)


@pytest.mark.slow
def test_the_command_line_refuses_what_does_not_fit_with_all_figures() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "loraplex_server", "--model", str(data_dir() / "base")]
    flags = ["--kv-cache-bytes", "4096GiB", "--port", "0", "--metrics-port", "-1", "--threads", "1"]
    done = subprocess.run(
        [*command, *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    for line in ("base weights (nf4)", "adapters", "workspace of a step", "KV cache", "budget"):
        assert line in done.stderr
    assert f"{4096 << 30} B" in done.stderr
    assert "--kv-cache-bytes" in done.stderr


def test_8_bit_floats_are_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(InvalidArgumentError, match=r"kv_cache_dtype: .* use auto, or --kernels torch"):
        memory._check_narrow_floats(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    memory._check_narrow_floats(torch.device("cuda"))


def test_available_bytes_are_no_more_than_the_machine_has() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("reads /proc")
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_steps_after_the_first_take_no_memory_from_the_driver(tiny: Callable[[str], Any]) -> None:
    config = EngineConfig(
        ModelConfig(str(tiny("Llama").base), quantization="nf4", dtype="bfloat16", device="cuda"),
        SchedulerConfig(max_batch_tokens=64, max_num_requests=8, kv_cache_bytes=8 << 20),
        AdapterConfig(device_bytes=1 << 20, max_per_request=1),
    )
    engine = build_engine(config, lambda client, message: None, progress=False)
    steps = [_prefill(64, 8, temperature=0.7), _prefill(1, 1), _prefill(17, 3), _prefill(40, 8)]
    for step in steps:
        engine._runner.run(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for step in steps * 8:
        engine._runner.run(step)
    torch.cuda.synchronize()
    planned = dict(engine.info.memory)[memory.WORKSPACE]
    peak = torch.cuda.max_memory_allocated() - held
    engine.adapters.close()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == before
    assert peak <= planned
