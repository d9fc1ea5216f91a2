"""The bench of fused ops: its floors are counted right, and its peers compute the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraplex_bench.ops.ops_fused import OPS, SHAPES, Case, Inputs, Shape, Timing, cases, check

TINY = Shape("tiny", 32, 4, 2, 8, 48)
CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sandwich", [False, True])
def test_peers_compute_the_same(op: str, sandwich: bool) -> None:
    case = Case(op, dataclasses.replace(TINY, sandwich=sandwich), 5)
    inputs = Inputs(case, torch.float32, CPU)
    peers = list(inputs.peers())
    assert peers == (["modules", "torch"] if "norm" in op else ["modules"])
    for peer in peers:
        check(Inputs(case, torch.float32, CPU), peer)


def test_queries_are_rotated_and_keys_written() -> None:
    inputs = Inputs(Case("rotation and write", TINY, 5), torch.float32, CPU)
    wanted = inputs.rotated()
    q, cache = inputs.own()
    assert torch.equal(q, wanted)
    assert torch.equal(cache[0, 1, :, :5].transpose(0, 1), inputs.v)


@pytest.mark.parametrize("op", OPS)
def test_floors_count_inputs_and_results(op: str) -> None:
    for sandwich in (False, True):
        case = Case(op, dataclasses.replace(TINY, sandwich=sandwich), 5)
        inputs = Inputs(case, torch.float32, CPU)
        if op == "rotation and write":
            wanted = 2 * sum(x.nbytes for x in (inputs.q, inputs.k, inputs.v))
            wanted += inputs.cos.nbytes + inputs.sin.nbytes + inputs.batch.slots.nbytes
        else:
            given = {
                "norm": lambda x: (x.x, x.norm.weight),
                "sum and norm": lambda x: (
                    x.x, x.residual, x.norm.weight, *([x.after.weight] if x.after else [])
                ),
                "gate": lambda x: (x.gate, x.up),
            }[op](inputs)  # fmt: skip
            wanted = sum(x.nbytes for x in (*given, *inputs.own()))
        assert case.least_bytes(4) == wanted


def test_the_table() -> None:
    assert len(list(cases())) == len(OPS) * len(SHAPES) * 5
    timing = Timing("gate", "tiny", 5, 4.0, 1.0, {"modules": 8.0, "compiled": None})
    assert timing.line().endswith("5 tokens     4.00 us,  25% of the roofline; modules 8.0 us (2.0x)")
