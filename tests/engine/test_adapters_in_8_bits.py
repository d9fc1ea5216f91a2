"""Adapters in 8 bits promise no level of exactness; they stay near, and the demo's answers stay right."""

from __future__ import annotations

from loraplex_bench.adapter_exactness import measure


def test_the_demo_model_keeps_its_answers() -> None:
    *each, together = measure(4, names=("upper", "rot13", "caesar3"))
    assert [one.adapter for one in each] == ["upper", "rot13", "caesar3"]
    print(f"\nadapters in 8 bits: logits off by {together.logit_error:.2%} of their deviation")
    assert 1e-4 < together.logit_error < 5e-3, "8 bits must differ, and not by much"
    assert together.right_auto == together.right_int8 == 1
