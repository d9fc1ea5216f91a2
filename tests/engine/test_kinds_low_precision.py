"""Level (ii) for prefix tuning and bottleneck adapters: in half precision as near to fp32 as the peer is.

The peer is PEFT for a prefix, and transformers with the adapter hooked in for a bottleneck. Logits are
teacher-forced, all kinds in one ragged row.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_server.adapters.record import Readiness
from loraplex_server.core.request import AdapterUse, Request
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.scheduler import Scheduled
from loraplex_server.engine.sequence import Sequence

LENGTH, BLOCK, VIRTUAL, REPEATS = 20, 4, 6, 4
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "scaling": "learned"},
    "pfeiffer": {"output_adapter": True, "original_ln_before": True},
    "parallel": {"output_adapter": True, "is_parallel": True, "non_linearity": "gelu", "scaling": 4.0},
}


@pytest.fixture(scope="module")
def saved(tiny: Any, bottlenecks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that holds the adapter's, by kind."""
    import peft
    from transformers import AutoModelForCausalLM

    base, folders = tiny("Llama").base, {}
    for seed, (name, settings) in enumerate(BOTTLENECKS.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        bottlenecks[0](base, folders[name] / name, {"reduction_factor": 4, **settings}, seed=seed)
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model = peft.get_peft_model(frozen, config)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 2)
    folders["prefix"] = tmp_path_factory.mktemp("prefix")
    model.save_pretrained(folders["prefix"] / "prefix")
    return folders


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, tuple[int, ...]]]:
    rng = random.Random(1)
    kinds = [*BOTTLENECKS, "prefix"] * REPEATS
    return [(kind, tuple(rng.randrange(3, 211) for _ in range(LENGTH))) for kind in kinds]


def _sequence(store: Any, index: int, kind: str, tokens: tuple[int, ...]) -> Sequence:
    handles = store.resolve([kind])
    readiness = store.reserve(handles)
    while readiness is Readiness.LOADING:
        store.wait_event(1.0)
        store.poll()
        readiness = store.is_ready(handles)
    assert readiness is Readiness.READY
    sequence = Sequence(Request(str(index), tokens, adapters=(AdapterUse(kind),)), "test", handles)
    size = -(-(LENGTH + VIRTUAL) // BLOCK)
    sequence.block_table = list(range(index * size, (index + 1) * size))
    sequence.num_computed = sequence.num_prefix
    return sequence


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("bfloat16", "nf4"), ("float16", "none")]
)
def test_half_precision_is_as_exact_as_the_peer(
    dtype: str, quantization: str, tiny: Any, judge_in: Any, bottlenecks: Any, harness: Any, saved: Any,
    rows: Any,
) -> None:  # fmt: skip
    base = tiny("Llama").base

    def peer(kind: str, dtype: str) -> torch.Tensor:
        if kind == "prefix":
            oracle = judge_in(dtype, base, saved[kind], quantization)
        else:
            oracle = bottlenecks[1](base, saved["prefix"], quantization, saved[kind] / kind, dtype)
        return torch.stack([oracle.logits(tokens, kind) for name, tokens in rows if name == kind])

    served = harness(
        tiny("Llama"),
        quantization,
        scheduler={"kv_block_size": BLOCK, "max_batch_tokens": len(rows) * LENGTH},
        adapters={"folders": tuple(saved.values())},
        model={"dtype": dtype},
    )
    store = served.engine.adapters
    sequences = [_sequence(store, index, *row) for index, row in enumerate(rows)]
    scheduled = [Scheduled(s, s.num_pending, s.num_prefix) for s in sequences]
    plan = build_plan(scheduled, BLOCK, store.slot, ())
    plan = dataclasses.replace(plan, sample_row=np.arange(plan.num_tokens))
    logits = served.engine._runner.logits(plan).float().view(len(rows), LENGTH, -1)
    for sequence in sequences:
        store.release(sequence.handles)
    for kind in dict.fromkeys(kind for kind, _ in rows):
        ours = torch.stack([logits[index] for index, (name, _) in enumerate(rows) if name == kind])
        truth, theirs = peer(kind, "float32"), peer(kind, dtype)
        error = (ours - truth).double().square().mean().sqrt()
        ratio = float(error / (theirs - truth).double().square().mean().sqrt())
        print(
            f"\nlevel (ii) Llama {quantization} {dtype} {kind}: error {float(error / truth.std()):.2e} of "
            f"the logits' deviation, {ratio:.2f} of the peer's"
        )
        assert ratio <= 1.5
