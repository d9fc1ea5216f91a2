"""The networks against a float64 oracle that goes token by token; tokens without one keep their bits."""

from __future__ import annotations

import math

import pytest
import torch

from loraplex_kernels import bottleneck
from loraplex_kernels.pool import (
    Bottleneck,
    BottleneckReads,
    EntryShape,
    LoraBatch,
    LoraPool,
    LoraSite,
    Run,
    VectorKind,
    VectorShape,
    adapter_layout,
)

HIDDEN, TOKENS = 24, 10
SITE = LoraSite(1, 40, ((0, HIDDEN),))
OTHER = LoraSite(2, 40, ((0, HIDDEN),))
RUNS: list[Run] = [(0, 2, ((0, 1.0),)), (3, 4, ((1, 1.0),)), (4, 7, ((3, 1.0),)), (8, 9, ((2, 1.0),))]
# Slot 2 serves a LoRA pair; slot 3 has its network at another site alone.
FORMS = {
    0: Bottleneck("relu", BottleneckReads.OUTPUT, {1: 5}),
    1: Bottleneck("gelu", BottleneckReads.SUM, {1: 3, 2: 7}),
    3: Bottleneck("tanh", BottleneckReads.RESIDUAL, {2: 4}),
}

Networks = dict[tuple[int, int], tuple[torch.Tensor, ...]]


def _pool(dtype: torch.dtype, *, scaled: bool = False) -> tuple[LoraPool, Networks]:
    """The arena is NaN where nothing lies; networks by slot and entry."""
    generator = torch.Generator().manual_seed(4)
    pool = LoraPool.allocate(
        num_elements=1 << 16, num_slots=4, num_entries=3, dtype=dtype, device="cpu", scaled=scaled
    )
    pool.arena.fill_(-1 if scaled else float("nan"))
    networks, start = {}, 0
    for slot, form in FORMS.items():
        shapes, values = [], []
        for entry, width in form.widths.items():
            parts = []
            for kind, length, rows in (
                (VectorKind.DOWN, HIDDEN, width),
                (VectorKind.DOWN_BIAS, width, 1),
                (VectorKind.UP, HIDDEN, width),
                (VectorKind.UP_BIAS, HIDDEN, 1),
            ):
                shapes.append(VectorShape(entry, kind, length, rows))
                value = torch.randn(rows, length, generator=generator).to(dtype)
                values.append(value)
                parts.append(value.double())
            networks[slot, entry] = tuple(parts)
        layout = adapter_layout([], vectors=shapes, scaled=scaled, bottleneck=form)
        start = -(-start // layout.alignment) * layout.alignment
        for offset, value in zip(layout.vector_offset, values, strict=True):
            first = start + offset
            if scaled:
                pool.arena[first : first + 4 * value.numel()].view(torch.float32)[:] = value.flatten()
            else:
                pool.arena[first : first + value.numel()] = value.flatten()
        pool.bind(slot, start, layout)
        start += layout.num_elements
    pair = adapter_layout([EntryShape(1, 40, HIDDEN, 3)], scaled=scaled)
    start = -(-start // pair.alignment) * pair.alignment
    pool.bind(2, start, pair)
    return pool, networks


def _exact(
    y: torch.Tensor, residual: torch.Tensor, networks: Networks, runs: list[Run], entry: int
) -> torch.Tensor:
    bends = {
        "relu": lambda value: max(value, 0.0),
        "gelu": lambda value: value * 0.5 * (1 + math.erf(value / math.sqrt(2))),
        "tanh": math.tanh,
    }
    y, residual = y.double(), residual.double()
    out = y.clone()
    for start, end, ((slot, _),) in runs:
        if (slot, entry) not in networks:
            continue
        down, down_bias, up, up_bias = networks[slot, entry]
        form = FORMS[slot]
        for token in range(start, end):
            read = {
                BottleneckReads.OUTPUT: y[token],
                BottleneckReads.SUM: y[token] + residual[token],
                BottleneckReads.RESIDUAL: residual[token],
            }[form.reads]
            narrow = [bends[form.non_linearity](float(value)) for value in down @ read + down_bias[0]]
            out[token] += torch.tensor(narrow, dtype=torch.float64) @ up + up_bias[0]
    return out


@pytest.mark.parametrize("scaled", [False, True], ids=["", "8 bits"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_it_equals_the_oracle(dtype: torch.dtype, tolerance: float, scaled: bool) -> None:
    pool, networks = _pool(dtype, scaled=scaled)
    batch = LoraBatch.build(RUNS)
    assert bottleneck.any_networks(pool, batch)
    for site in (SITE, OTHER):
        y, residual = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(TOKENS, HIDDEN).to(dtype)
        exact = _exact(y, residual, networks, RUNS, site.first_entry)
        before = y.clone()
        bottleneck.add(y, residual, pool, site, batch)
        scale = exact.abs().max()
        torch.testing.assert_close(y.double() / scale, exact / scale, rtol=0, atol=tolerance)
        used = {t for start, end, ((slot, _),) in RUNS if (slot, site.first_entry) in networks
                for t in range(start, end)}  # fmt: skip
        for token in range(TOKENS):
            assert torch.equal(y[token], before[token]) == (token not in used)


def test_the_residual_stream_is_asked_for_only_where_it_is_read() -> None:
    pool, _ = _pool(torch.float32)
    output = LoraBatch.build([(0, 2, ((0, 1.0),))])
    stream = LoraBatch.build([(0, 2, ((1, 1.0),))])
    assert not bottleneck.reads_residual(pool, output, SITE)
    assert bottleneck.reads_residual(pool, stream, SITE)
    bottleneck.add(torch.zeros(2, HIDDEN), None, pool, SITE, output)
    with pytest.raises(ValueError, match="reads the residual stream"):
        bottleneck.add(torch.zeros(2, HIDDEN), None, pool, SITE, stream)
    with pytest.raises(ValueError, match="y must be at least"):
        bottleneck.add(torch.zeros(1, HIDDEN), None, pool, SITE, output)


def test_a_slot_given_to_another_adapter_takes_its_networks_along() -> None:
    pool, _ = _pool(torch.float32)
    batch = LoraBatch.build([(0, 2, ((0, 1.0),))])
    y = torch.ones(2, HIDDEN)
    bottleneck.add(y, None, pool, SITE, batch)
    assert not torch.equal(y, torch.ones(2, HIDDEN))
    pool.clear(0)
    y = torch.ones(2, HIDDEN)
    bottleneck.add(y, None, pool, SITE, batch)
    assert torch.equal(y, torch.ones(2, HIDDEN))
    assert not bottleneck.any_networks(pool, batch)
    assert not bottleneck.any_networks(pool, LoraBatch.build([(0, 2, ((2, 1.0),))]))


def test_non_linearities_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 1001)
    for name, bend in bottleneck.NON_LINEARITIES.items():
        exact = ACT2FN["leaky_relu" if name == "leakyrelu" else name](x)
        torch.testing.assert_close(bend(x), exact, rtol=1e-5, atol=1e-5)
