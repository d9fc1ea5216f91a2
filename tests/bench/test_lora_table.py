"""The bench of the LoRA op: its cases, what it counts, and that its contenders compute the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex_bench.ops import lora, lora_cases, lora_contenders, registry
from loraplex_bench.ops.lora_cases import MODELS, Case
from loraplex_bench.ops.registry import Figure, Row, Setting
from loraplex_bench.ops.report import as_json, summary
from loraplex_bench.ops.timers import Ceilings
from loraplex_bench.peers.lora_kernels import PeerFilesError, load_sglang, load_vllm
from loraplex_kernels import dispatch
from loraplex_kernels.lora import apply
from loraplex_kernels.pool import LoraBatchBuffers

TINY = MODELS["tiny"]


@pytest.fixture(autouse=True)
def _in_torch() -> Iterator[None]:
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
    shape = MODELS["llama-3-8b"]
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
    own, other = lora_contenders.OwnKernels(layers), lora_contenders.TorchBmm(layers)
    case = Case("tiny", 20, "zipf-1.5", ranks)
    work = lora_cases.workload(case, TINY, copies=2)
    data = lora_cases.activations(TINY, 20, torch.float32, torch.device("cpu"))

    def error() -> float:
        return registry.largest_error(lora.deltas(other, work, data), lora.deltas(own, work, data))

    assert error() <= registry.TOLERANCE
    layers.pool.a(0, 0, TINY.hidden).mul_(2)
    assert error() > registry.TOLERANCE, "a wrong contender passed"


def test_a_peer_whose_files_are_not_there_says_so(tmp_path: Path) -> None:
    layers = lora_cases.make_layers("tiny", "8", 1, torch.float32, torch.device("cpu"))
    with pytest.raises(PeerFilesError, match="vllm lacks kernel_utils"):
        lora_contenders.VllmPeer(layers, tmp_path)
    with pytest.raises(PeerFilesError, match="sglang lacks lora_tuning"):
        lora_contenders.SglangPeer(layers, tmp_path)


def test_the_files_of_peers_find_what_they_import(tmp_path: Path) -> None:
    """Files that import as the real ones do."""
    pytest.importorskip("triton")
    vllm = {
        "kernel_utils": "from vllm.triton_utils import tl, triton\n"
        "import vllm.envs as envs\nenvs.VLLM_LORA_DISABLE_PDL",
        "utils": "from vllm.logger import init_logger\nfrom vllm.platforms import current_platform\n"
        "from vllm.utils.math_utils import next_power_of_2\ninit_logger(__name__).info_once('loaded')\n"
        "current_platform.has_device_capability(90)\nassert next_power_of_2(5) == 8",
        "lora_shrink_op": "from vllm.utils.torch_utils import direct_register_custom_op\n"
        "from vllm.lora.ops.triton_ops.kernel_utils import tl\n_lora_shrink = print\n"
        "try:\n    direct_register_custom_op(op_name='x')\nexcept AttributeError:\n    plain = True",
        "lora_expand_op": "from vllm.lora.ops.triton_ops.utils import init_logger\n_lora_expand = print",
        "lora_kernel_metadata": "class LoRAKernelMeta: pass",
    }
    sglang = {
        "lora_tuning_config": "from sglang.srt.utils import get_device_name\nget_device_name()",
        "chunked_sgmv_shrink": "from sglang.srt.environ import envs\n"
        "from sglang.srt.lora.utils import LoRABatchInfo\n"
        "assert not envs.SGLANG_ENABLE_LORA_CSGMV_SPLIT_K.get()\nchunked_sgmv_lora_shrink_forward = print",
        "chunked_sgmv_expand": "from sglang.srt.utils import cached_triton_kernel\n"
        "from sglang.kernels.ops.lora.dense.lora_tuning_config import get_device_name\n"
        "chunked_sgmv_lora_expand_forward = cached_triton_kernel(lambda *_: 0)(print)",
    }
    for folder, files in (("vllm", vllm), ("sglang", sglang)):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / f"{name}.py").write_text(text)
    before = set(sys.modules)
    try:
        assert load_vllm(tmp_path / "vllm").shrink is print
        assert load_sglang(tmp_path / "sglang").expand is print
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("vllm", "sglang"):
                del sys.modules[name]


def test_bmm_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_contenders.TorchBmm, "max_bytes", 1 << 20)
    layers = lora_cases.make_layers("tiny", "64", 1, torch.float32, torch.device("cpu"))
    peer = lora_contenders.TorchBmm(layers)
    peer.prepare([0])
    with pytest.raises(registry.UnavailableError, match="gathers"):
        peer.prepare([0] * 4096)


def test_rows_come_one_by_one_until_the_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Contenders that cannot run say why, the others are timed."""
    monkeypatch.setattr(lora_contenders.VllmPeer.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(lora_contenders.SglangPeer.__init__, "__defaults__", (tmp_path,))
    wanted = [Case("tiny", 5, "distinct", ranks) for ranks in ("8", "mixed 6-64")]
    op, setting, ceilings = lora.OPS[1], Setting.dry(), Ceilings(1e9, 1e12)
    rows = list(registry.rows(op, wanted, setting, ceilings, limit_s=math.inf))
    assert [row.case for row in rows] == list(map(str, wanted))
    for row in rows:
        assert {figure.contender for figure in row.figures if figure.us} == {"loraplex", "torch bmm"}
        assert {figure.contender for figure in row.figures if figure.not_run} == {"vLLM", "SGLang csgmv"}
        assert row.speedup("loraplex", "torch bmm") is not None
    assert not list(registry.rows(op, wanted, setting, ceilings, limit_s=-1))


def test_summary_is_the_geometric_mean() -> None:
    def row(group: str, peer_us: float) -> Row:
        figures = (
            Figure("loraplex", "own", 10.0, 10.0, roofline=0.1),
            Figure("other", "peer", peer_us, peer_us),
        )
        return Row("lora", "a case", group, {}, figures)

    rows = [row("same ranks", 20.0), row("same ranks", 80.0), row("mixed ranks", 50.0)]
    found = summary(rows)
    assert found["loraplex over other, same ranks"] == pytest.approx(math.sqrt(16))
    assert found["loraplex over other, mixed ranks"] == pytest.approx(5)
    assert found["loraplex, largest share of the roofline"] == pytest.approx(0.1)
    assert as_json(rows[0])["speedup"] == {"loraplex": {"other": 2.0}}


def test_the_table_holds_every_case_that_the_targets_speak_of() -> None:
    wanted = lora_cases.cases()
    assert len(set(wanted)) == len(wanted)
    big = {(case.tokens, case.mix, case.ranks) for case in wanted if case.model == "llama-3-8b"}
    for ranks in lora_cases.RANK_SETS:
        for tokens in lora_cases.TOKENS[1:]:
            assert {(tokens, mix, ranks) for mix in lora_cases.MIXES} <= big
    assert wanted[0].tokens == 64
    assert len(lora_cases.cases(quick=True)) == 12


def test_no_launch_without_adapters() -> None:
    """The op over a model where no token has an adapter, called as the server does."""
    shape = MODELS["llama-3-1b"]
    device = torch.device("cpu")
    pool = lora_cases.make_pool(shape, [8], torch.bfloat16, device)
    data = lora_cases.activations(shape, 64, torch.bfloat16, device)
    batch = LoraBatchBuffers(max_tokens=64, max_pairs=64, device=device).fill([(0, 64, ())])
    before = dispatch.launches.copy()
    for name, of_layers in lora_cases.make_sites(shape).items():
        for site in of_layers:
            if batch.num_pairs:
                apply(*data[name], pool, site, batch)
    assert dispatch.launches == before
