"""The bench of the 4-bit products for a GPU, tried out on the CPU."""

from __future__ import annotations

import pytest
import torch

from loraplex_bench.ops import ops_quant_cuda
from loraplex_bench.ops.ops_quant_cuda import QuantTiming, measure_cuda, row

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_quant_cuda, "_COLD_BYTES", 1 << 12)


def test_every_product_is_checked_and_timed() -> None:
    shapes = {"o": (64, 128), "down": (32, 256)}
    found = list(measure_cuda(60, rows=(1, 5), shapes=shapes, peers=False, device=CPU))
    assert {(timing.product, timing.site, timing.rows) for timing in found} == {
        (product, site, rows)
        for product in ("cublas-bf16", "nf4", "int4", "nf4-double")
        for site in shapes
        for rows in (1, 5)
    }
    for timing in found:
        assert timing.not_run is None
        assert timing.us is not None
        assert timing.us > 0
        assert timing.roofline is not None
        assert timing.speedup is not None
        if timing.product != "cublas-bf16":
            assert timing.error is not None
            assert timing.error < 0.01
            assert timing.plan is not None
        assert timing.product in row(timing)


def test_the_limit_ends_it_and_keeps_what_was_measured() -> None:
    found = list(measure_cuda(0, rows=(1, 5), shapes={"o": (64, 128)}, peers=False, device=CPU))
    assert found[0].us is not None
    assert found[-1].not_run == "0 s are over"
    assert len(found) == 2


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ops_quant_cuda, "_blocked", lambda weight, x: x @ torch.ones(x.shape[1], 64).bfloat16()
    )
    found = list(
        measure_cuda(60, rows=(2,), shapes={"o": (64, 128)}, products=("nf4",), peers=False, device=CPU)
    )
    wrong = found[-1]
    assert (wrong.us, wrong.not_run) == (None, "the result is wrong")
    assert "not run: the result is wrong" in row(wrong)


def test_a_peer_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_quant_cuda, "_bitsandbytes_apart", lambda *_: iter(()))
    monkeypatch.setitem(__import__("sys").modules, "gemlite", None)
    found = list(measure_cuda(60, rows=(1,), shapes={"o": (64, 128)}, products=(), device=CPU))
    assert isinstance(found[-1], QuantTiming)
    assert found[-1].product == "gemlite-int4"
    assert "gemlite" in (found[-1].not_run or "")


def test_candidates_fit_their_rows() -> None:
    for rows in ops_quant_cuda.ROWS:
        for plan in ops_quant_cuda.candidates(rows):
            if plan.family != "library" and rows <= 64:
                assert plan.rows >= rows
