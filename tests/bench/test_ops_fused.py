"""The bench of fused ops: its floors are counted right, and its peers compute the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loraplex_bench.ops.fused import OP, OPS, SHAPES, Case, Inputs, Shape, cases
from loraplex_bench.ops.registry import Figure, Row, Setting, error_of
from loraplex_bench.ops.report import lines

TINY = Shape("tiny", 32, 4, 2, 8, 48)
CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sandwich", [False, True])
def test_peers_compute_the_same(op: str, sandwich: bool) -> None:
    case = Case(op, dataclasses.replace(TINY, sandwich=sandwich), 5)
    contenders = {one.name: one for one in OP.prepare(case, Setting.dry())}
    peers = [name for name, one in contenders.items() if one.role == "peer"]
    assert peers == (["modules", "torch"] if "norm" in op else ["modules"])
    for contender in contenders.values():
        assert contender.results is not None
        assert contender.reference is not None
        for found, result in zip(contender.results(), contender.reference(), strict=True):
            torch.testing.assert_close(found, result, atol=1e-5, rtol=1e-5)
        assert (error_of(contender) or 0.0) < 1e-5


def test_queries_are_rotated_and_keys_written() -> None:
    inputs = Inputs(Case("rotation and write", TINY, 5), torch.float32, CPU)
    wanted, _ = inputs.copy().reference()
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
    figures = (
        Figure("loraplex", "own", 4.0, 3.0, roofline=0.25),
        Figure("modules", "peer", 8.0, 7.0),
        Figure("compiled", "peer", not_run="no compiler"),
    )
    row = Row("fused", "gate, tiny, 5 tokens", "", {}, figures)
    line, other = lines(row)
    assert line.endswith("loraplex 4.0 us (least 3.0), 25% of the roofline; modules 8.0 us (2.00x)")
    assert other == "  not run: compiled: no compiler"
