"""Level (ii): bf16, fp16 and packed int4 stay as near to the fp32 oracle as PEFT in that dtype.

Logits are teacher-forced: every position of given sequences, all adapters and the base in one ragged row.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_server.adapters.residency.record import Readiness
from loraplex_server.core.request import AdapterUse, Request
from loraplex_server.core.step import StepPlan
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.engine.sequence import Sequence

ARCHITECTURES = [
    "Llama",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3")
    ),
]
LENGTH = 20
BLOCK = 4


@pytest.fixture(scope="module")
def rows(adapter_names: list[str]) -> list[tuple[str | None, tuple[int, ...]]]:
    """(adapter, tokens): three sequences for each adapter and the base."""
    rng = random.Random(1)
    owners: list[str | None] = [*adapter_names, None]
    return [(owner, tuple(rng.randrange(3, 211) for _ in range(LENGTH))) for owner in owners * 3]


@contextmanager
def planned(engine: Any, rows: list[tuple[str | None, tuple[int, ...]]]) -> Iterator[StepPlan]:
    """A plan that computes `rows` whole and asks for the logits of every position."""
    store = engine.adapters
    sequences = []
    for index, (adapter, tokens) in enumerate(rows):
        names = [] if adapter is None else [adapter]
        handles = store.requests.resolve(names)
        readiness = store.requests.reserve(handles)
        while readiness is Readiness.LOADING:
            store.wait_event(1.0)
            store.poll()
            readiness = store.requests.is_ready(handles)
        assert readiness is Readiness.READY
        sequence = Sequence(
            Request(str(index), tokens, adapters=tuple(map(AdapterUse, names))), "test", handles
        )
        size = -(-len(tokens) // BLOCK)
        sequence.block_table = list(range(index * size, (index + 1) * size))
        sequences.append(sequence)
    plan = build_plan([Scheduled(s, s.num_pending) for s in sequences], BLOCK, store.requests.slot, ())
    yield dataclasses.replace(plan, sample_row=np.arange(plan.num_tokens))
    for sequence in sequences:
        store.requests.release(sequence.handles)


def served_logits(harness: Any, tiny_model: Any, rows: Any, quantization: str, dtype: str) -> torch.Tensor:
    """The engine's logits for `rows`, [rows, LENGTH, vocabulary]."""
    served = harness(
        tiny_model,
        quantization,
        scheduler={"kv_block_size": BLOCK, "max_batch_tokens": len(rows) * LENGTH},
        model={"dtype": dtype},
    )
    with planned(served.engine, rows) as plan:
        logits: torch.Tensor = served.engine._runner.logits(plan)
    return logits.float().cpu().view(len(rows), LENGTH, -1)


def assert_ties_only(found: torch.Tensor, truth: torch.Tensor) -> int:
    """Greedy tokens differ only where the oracle's two best lie closer than twice the error there."""
    differs = found.argmax(dim=-1) != truth.argmax(dim=-1)
    best = truth.topk(2, dim=-1).values
    margin = best[..., 0] - best[..., 1]
    error = (found - truth).abs().amax(dim=-1)
    assert bool((margin[differs] <= 2 * error[differs]).all())
    return int(differs.sum())


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "nf4"), ("bfloat16", "int4"), ("float16", "int4")]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_is_as_exact_as_peft(
    architecture: str, dtype: str, quantization: str, tiny: Any, oracle: Any, harness: Any, rows: Any
) -> None:
    exact, peer = oracle(architecture, quantization), oracle(architecture, quantization, dtype)
    truth = torch.stack([exact.logits(tokens, adapter) for adapter, tokens in rows])
    theirs = torch.stack([peer.logits(tokens, adapter) for adapter, tokens in rows])
    ours = served_logits(harness, tiny(architecture), rows, quantization, dtype)
    ratio = rms(ours - truth) / rms(theirs - truth)
    ties = assert_ties_only(ours, truth)
    print(
        f"\nlevel (ii) {architecture} {quantization} {dtype}: error {rms(ours - truth) / truth.std():.2e} of "
        f"the logits' deviation, {ratio:.2f} of PEFT's; {ties} of {truth.shape[0] * LENGTH} greedy tokens "
        "differ, all ties"
    )
    assert ratio <= 1.5


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="packed int4 is a CPU format; --dtype auto is bf16 here"
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_int4_stays_within_two_percent(
    architecture: str, tiny: Any, oracle: Any, harness: Any, rows: Any
) -> None:
    """`--dtype auto` on a CPU multiplies packed int4 in bf16; activations stay fp32."""
    exact = oracle(architecture, "int4")
    # Few rows take the packed kernel, many the dense tiles: both are looked at.
    for part in (rows[:1], rows):
        truth = torch.stack([exact.logits(tokens, adapter) for adapter, tokens in part])
        ours = served_logits(harness, tiny(architecture), part, "int4", "auto")
        error = rms(ours - truth) / float(truth.std())
        ties = assert_ties_only(ours, truth)
        print(
            f"\nlevel (ii) {architecture} packed int4, {len(part)} sequences: error {error:.2e}, {ties} ties"
        )
        assert error <= 0.02
