"""The bench of the LoRA op: its cases, what it counts, and that its contenders compute the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loraplex_bench.ops import lora_cases, lora_peers, lora_table, ops_lora
from loraplex_bench.ops.lora_cases import Case
from loraplex_bench.ops.ops_lora import ModelShape
from loraplex_kernels import dispatch

TINY = ModelShape(hidden=64, key_value=32, intermediate=96, layers=2)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ops_lora.MODELS, "tiny", TINY)
    with dispatch.using("torch"):
        yield


@pytest.mark.parametrize(
    ("mix", "tokens", "distinct"),
    [("identical", 64, 1), ("distinct", 16, 16), ("distinct", 64, 64), ("distinct", 1024, 64)],
)
def test_mixes(mix: str, tokens: int, distinct: int) -> None:
    adapters = lora_cases.adapters_of_tokens(mix, tokens)
    assert len(adapters) == tokens
    assert len(set(adapters)) == distinct
    counts = [adapters.count(slot) for slot in set(adapters)]
    assert max(counts) == min(counts) == tokens // distinct


@pytest.mark.parametrize("mix", lora_cases.MIXES)
@pytest.mark.parametrize("tokens", lora_cases.TOKENS)
def test_tokens_of_one_adapter_stand_together(mix: str, tokens: int) -> None:
    adapters = lora_cases.adapters_of_tokens(mix, tokens)
    assert adapters == sorted(adapters)
    assert 0 <= adapters[0] <= adapters[-1] < lora_cases.POOL_ADAPTERS
    runs = lora_cases.runs_of(adapters)
    assert [end - start for start, end, _ in runs] == [adapters.count(run[2][0][0]) for run in runs]


@pytest.mark.parametrize("ranks", ["8", "mixed 6-64"])
@pytest.mark.parametrize("mix", lora_cases.MIXES)
def test_passes_keep_adapters_cold_and_count_their_bytes(mix: str, ranks: str) -> None:
    shape = ops_lora.MODELS["llama-3-8b"]
    case = Case("llama-3-8b", 64, mix, ranks)
    work = lora_cases.workload(case, shape, copies=4)
    rank_row_bytes = 2 * (3 * 4096 + 6144 + 4096 + 4096 + 2 * 4096 + 2 * 14336 + 14336 + 4096)
    used = [(copy, slot) for copy, slots in work.passes for slot in set(slots)]
    adapter_bytes = rank_row_bytes * sum(lora_cases.rank_of_slot(ranks, slot) for _, slot in used)
    token_bytes = 2 * (4096 + 2 * 6144 + 4096 + 2 * 4096 + 4096 + 2 * 28672 + 14336 + 2 * 4096)
    assert work.bytes_per_pass == pytest.approx(adapter_bytes / len(work.passes) + 64 * token_bytes)
    assert adapter_bytes >= lora_cases.COLD_BYTES
    assert len(set(used)) == len(used), "an adapter is read twice"
    assert all(0 <= slot < lora_cases.POOL_ADAPTERS for _, slot in used)


@pytest.mark.parametrize("ranks", ["16", "mixed 6-64"])
def test_contenders_agree(ranks: str) -> None:
    layers = lora_cases.make_layers("tiny", ranks, 2, torch.float32, torch.device("cpu"))
    own, other = lora_peers.OwnKernels(layers), lora_peers.TorchBmm(layers)
    case = Case("tiny", 20, "zipf-1.5", ranks)
    work = lora_cases.workload(case, TINY, copies=2)
    data = lora_table.activations(TINY, 20, torch.float32, torch.device("cpu"))
    assert lora_table.agrees(other, own, work, data)
    layers.pool.a(0, 0, TINY.hidden).mul_(2)
    assert not lora_table.agrees(other, own, work, data), "a wrong contender passed"


def test_a_peer_whose_files_are_not_there_says_so(tmp_path: Path) -> None:
    layers = lora_cases.make_layers("tiny", "8", 1, torch.float32, torch.device("cpu"))
    with pytest.raises(lora_peers.PeerUnavailableError, match="vllm lacks kernel_utils"):
        lora_peers.VllmPeer(layers, tmp_path)
    with pytest.raises(lora_peers.PeerUnavailableError, match="sglang lacks lora_tuning"):
        lora_peers.SglangPeer(layers, tmp_path)


def test_bmm_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_peers.TorchBmm, "max_bytes", 1 << 20)
    layers = lora_cases.make_layers("tiny", "64", 1, torch.float32, torch.device("cpu"))
    peer = lora_peers.TorchBmm(layers)
    peer.prepare([0])
    with pytest.raises(lora_peers.PeerUnavailableError, match="gathers"):
        peer.prepare([0] * 4096)


def test_rows_come_one_by_one_until_the_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but the clock, on CPU: contenders that cannot run say why, the others are timed."""
    runs: list[object] = []

    def seconds(run: Callable[[], object]) -> float:
        runs.append(run())
        return 1e-3

    monkeypatch.setattr(lora_table, "graph_seconds", seconds)
    monkeypatch.setattr(lora_peers.VllmPeer.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(lora_peers.SglangPeer.__init__, "__defaults__", (tmp_path,))
    wanted = [Case("tiny", 5, "distinct", ranks) for ranks in ("8", "mixed 6-64")]
    device = torch.device("cpu")
    rows = list(lora_table.measure_all(wanted, torch.float32, device, deadline=math.inf))
    assert [row.case for row in rows] == wanted
    for row in rows:
        assert set(row.us) == {"loraplex", "torch bmm"}
        assert set(row.not_run) == {"vLLM", "SGLang csgmv"}
        assert row.speedup("torch bmm") == 1
    assert len(runs) == 4
    assert not list(lora_table.measure_all(wanted, torch.float32, device, deadline=-1))


def test_summary_is_the_geometric_mean() -> None:
    case = Case("llama-3-8b", 64, "distinct", "16")
    rows = [
        lora_table.Row(case, 3e6, {"loraplex": 10.0, "other": 20.0}),
        lora_table.Row(case, 3e6, {"loraplex": 10.0, "other": 80.0}),
        lora_table.Row(dataclasses.replace(case, ranks="mixed 6-64"), 3e6, {"loraplex": 10.0, "other": 50.0}),
    ]
    found = lora_table.summary(rows, ceiling=3e12)
    assert found["other, same ranks"] == pytest.approx(math.sqrt(16))
    assert found["other, mixed ranks"] == pytest.approx(5)
    assert found["largest share of the roofline"] == pytest.approx(0.1)
    assert lora_table.as_json(rows[0], 3e12)["gb_per_s"] == pytest.approx(300)


def test_the_table_holds_every_case_that_the_targets_speak_of() -> None:
    wanted = lora_table.cases()
    assert len(set(wanted)) == len(wanted)
    big = {(case.tokens, case.mix, case.ranks) for case in wanted if case.model == "llama-3-8b"}
    for ranks in lora_cases.RANK_SETS:
        for tokens in lora_cases.TOKENS[1:]:
            assert {(tokens, mix, ranks) for mix in lora_cases.MIXES} <= big
    assert wanted[0].tokens == 64
    assert len(lora_table.cases(quick=True)) == 12


def test_no_launch_without_adapters() -> None:
    assert lora_table.empty_step_launches(torch.device("cpu")) == 0
