"""The bench of the 4-bit products for a GPU, tried out on the CPU."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

from loraplex_bench.ops import quant
from loraplex_bench.ops.catalogue import OPS
from loraplex_bench.ops.quant import Case
from loraplex_bench.ops.registry import Row, Setting, rows
from loraplex_bench.ops.report import lines
from loraplex_bench.ops.timers import Ceilings

CEILINGS = Ceilings(1e9, 1e9)
CASES = [Case(site, n, k, count) for site, n, k in (("o", 64, 128), ("down", 32, 256)) for count in (1, 5)]


def found(cases: list[Case], limit_s: float = 60.0) -> list[Row]:
    return list(rows(OPS["quant"], cases, Setting.dry(), CEILINGS, limit_s))


def test_every_product_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemlite", None)
    timed = found(CASES)
    assert [(row.values["site"], row.values["rows"]) for row in timed] == [(c.site, c.rows) for c in CASES]
    for row in timed:
        ran = {figure.contender: figure for figure in row.figures if figure.contender != "gemlite-int4"}
        assert set(ran) == {"cublas-bf16", "nf4", "int4", "nf4-double"}
        for name, timing in ran.items():
            assert timing.not_run is None
            assert timing.us is not None
            assert timing.us > 0
            assert timing.roofline is not None
            assert row.speedup(name, "cublas-bf16") is not None
            assert timing.error is not None
            assert timing.error < 0.01
            if name != "cublas-bf16":
                assert timing.note
            assert name in "".join(lines(row))


def test_the_limit_ends_it_and_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(CASES, limit_s=-1) == []
    clock = iter((0.0, 0.0, 2.0))
    monkeypatch.setattr("loraplex_bench.ops.registry.time.monotonic", lambda: next(clock))
    (row,) = found(CASES, limit_s=1.0)
    assert row.us("nf4") is not None


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(x.shape[1], 64).to(x.dtype)

    held = dataclasses.replace(quant.FORMATS["nf4"], multiply=wrong)
    monkeypatch.setitem(quant.FORMATS, "nf4", held)
    (row,) = found([Case("o", 64, 128, 2)])
    timing = next(figure for figure in row.figures if figure.contender == "nf4")
    assert (timing.us, timing.not_run) == (None, "the result is wrong")
    assert "  not run: nf4: the result is wrong" in lines(row)


def test_a_peer_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemlite", None)
    (row,) = found([Case("o", 64, 128, 1)])
    peer = row.figures[-1]
    assert peer.contender == "gemlite-int4"
    assert "gemlite" in (peer.not_run or "")


def test_candidates_fit_their_rows() -> None:
    for count in quant.ROWS:
        for plan in quant.candidates(count):
            if plan.family != "library" and count <= 64:
                assert plan.rows >= count
