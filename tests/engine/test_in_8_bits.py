"""Adapters or the KV cache in 8 bits are not exact; they stay near, and the demo's answers stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplex_bench.scenarios.exactness import measure

# Of the logits' deviation: they must differ, and not by much.
BOUNDS = {"adapters": (1e-4, 5e-3), "kv-cache": (1e-3, 1e-1)}


@pytest.mark.parametrize("option", BOUNDS)
def test_the_demo_model_keeps_its_answers(option: str) -> None:
    *each, together = measure(option, 4, names=("upper", "rot13", "caesar3"))
    assert [one.adapter for one in each] == ["upper", "rot13", "caesar3"]
    print(f"\n{option} in 8 bits: logits off by {together.logit_error:.2%} of their deviation")
    least, most = BOUNDS[option]
    assert least < together.logit_error < most
    assert together.right_plain == together.right_narrow == 1


def test_an_8_bit_cache_answers_alike_however_the_prompt_is_cut(
    tiny: Callable[[str], Any], harness: Callable[..., Any]
) -> None:
    """Attention always reads the cache's values, even for tokens computed in the same step."""

    def first_logprobs(**settings: Any) -> list[dict[int, float]]:
        served = harness(tiny("Mistral"), scheduler={"kv_block_size": 4, "max_batch_tokens": 64, **settings})
        uses = ([("r6", 1.0)], [("r7", 0.5), ("r4", 0.5)], [])
        asked = [
            served.submit(str(index), range(5 + index, 22), adapters, max_tokens=1, logprobs=5)
            for index, adapters in enumerate(uses)
        ]
        served.run()
        return [{top.token_id: top.logprob for top in answer.logprobs[0].top} for answer in asked]

    def difference(one: list[dict[int, float]], other: list[dict[int, float]]) -> float:
        pairs = [
            (a[token], b[token]) for a, b in zip(one, other, strict=True) for token in a.keys() & b.keys()
        ]
        assert len(pairs) > len(one), "few tokens are likely with both"
        return max(abs(a - b) for a, b in pairs)

    plain, whole = first_logprobs(kv_cache_dtype="auto"), first_logprobs(kv_cache_dtype="fp8")
    cut = first_logprobs(kv_cache_dtype="fp8", max_batch_tokens=3)
    bits, cuts = difference(whole, plain), difference(whole, cut)
    print(f"\n8 bits change log-probabilities by {bits:.2g}, cuts by {cuts:.2g}")
    # Sums of other lengths differ in the last bit, by which a few values are rounded to another neighbour.
    assert cuts < bits / 4
