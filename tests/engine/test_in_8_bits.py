"""Adapters or the KV cache in 8 bits are not exact; they stay near, and the demo's answers stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loraplex_bench.exactness import measure

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
    answers = []
    for settings in (
        {"max_batch_tokens": 64},
        {"max_batch_tokens": 3},
        {"max_batch_tokens": 64, "kv_cache_dtype": "auto"},
    ):
        found = harness(tiny("Mistral"), scheduler={"kv_block_size": 4, "kv_cache_dtype": "fp8", **settings})
        for index, uses in enumerate(([("r6", 1.0)], [("r7", 0.5), ("r4", 0.5)], [])):
            found.submit(str(index), range(5 + index, 22), uses, max_tokens=8, ignore_eos=True, logprobs=0)
        found.run()
        answers.append(
            [(a.tokens, [round(p.logprob, 3) for p in a.logprobs]) for a in found.answers.values()]
        )
    whole, cut, plain = answers
    assert whole == cut
    assert whole != plain
