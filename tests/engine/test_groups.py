"""Several answers to one prompt, computed once: level (i), those of requests of their own."""

from __future__ import annotations

import random
from typing import Any

import pytest

BLOCK = 4
PROMPT = tuple(random.Random(2).choices(range(3, 211), k=30))
WHOLE = (len(PROMPT) - 1) // BLOCK * BLOCK
KV_BYTES = 2 * 2 * 2 * 16 * 4
OWNERS: list[list[tuple[str, float]]] = [[], [("r16", 1.0)], [("r6", 1.0), ("r14", -0.5)]]


def make(harness: Any, tiny: Any, **scheduler: Any) -> Any:
    return harness(tiny("Llama"), scheduler={"kv_block_size": BLOCK, **scheduler})


def members(
    served: Any, name: str, count: int, adapters: Any, *, grouped: bool = True, **options: Any
) -> list[Any]:
    """A group as the API makes it, seeds that follow one another; or the same requests by themselves."""
    options = {"max_tokens": 8, "ignore_eos": True, "seed": 40, **options}
    seed = options.pop("seed")
    return [
        served.submit(
            f"{name}-{index}", PROMPT, adapters, group=name if grouped else "", seed=seed + index, **options
        )
        for index in range(count)
    ]


def prefill_tokens(served: Any) -> int:
    return sum(step.prefill_tokens for step in served.engine.stats().steps)


@pytest.mark.parametrize("own", [{"cache_prefix": False}, {"prefix_cache": False}, {}], ids=str)
def test_a_groups_prompt_is_computed_once_and_every_answer_is_its_own(
    own: dict[str, Any], tiny: Any, harness: Any
) -> None:
    """With the prefix cache, without it, and for who wants nothing of it; drawn and greedy."""
    cached = own.get("cache_prefix", True)
    served = make(harness, tiny, prefix_cache=own.get("prefix_cache", True), max_batch_tokens=24)
    alone = make(harness, tiny, prefix_cache=False)
    for turn, adapters in enumerate(OWNERS):
        for temperature in (0.0, 1.5):
            name = f"{turn}-{temperature}"
            options = {"temperature": temperature, "cache_prefix": cached}
            before = served.engine.stats().kv_blocks_cached
            found = members(served, name, 5, adapters, **options)
            served.run()
            singles = members(alone, name, 5, adapters, grouped=False, temperature=temperature)
            alone.run()
            assert [answer.tokens for answer in found] == [answer.tokens for answer in singles]
            different = {tuple(answer.tokens) for answer in found}
            assert len(different) == (1 if temperature == 0 else 5)
            # Of the last, unfinished block each computes its part.
            computed = len(PROMPT) + 4 * (len(PROMPT) - WHOLE)
            stats = served.engine.stats()
            assert [answer.times.cached_prompt_tokens for answer in found[1:]] == [WHOLE] * 4
            if own:
                assert sum(step.prefill_tokens for step in stats.steps) == computed
                assert found[0].times.cached_prompt_tokens == 0
                assert (stats.kv_blocks_cached, stats.prefix_queries) == (before, 0)
            elif temperature == 0:
                assert sum(step.prefill_tokens for step in stats.steps) == computed
        assert prefill_tokens(alone) == 10 * len(PROMPT)
    print("\nlevel (i) Llama: answers of groups are those of single requests, prompts computed once")


def test_groups_share_nothing_with_each_other_nor_with_the_cache(tiny: Any, harness: Any) -> None:
    served = make(harness, tiny)
    served.submit("public", PROMPT, max_tokens=1)
    served.run()
    assert prefill_tokens(served) == len(PROMPT)
    for group in ("one", "two"):
        members(served, group, 2, [], cache_prefix=False)
    served.run()
    assert prefill_tokens(served) == 2 * (2 * len(PROMPT) - WHOLE)
    later = served.submit("later", PROMPT, max_tokens=1, ignore_eos=True)
    served.run()
    assert later.times.cached_prompt_tokens == WHOLE


def test_groups_come_through_preemption_cancellation_and_scoring(tiny: Any, harness: Any) -> None:
    """Too little room for a group: members that are put back find what the others still hold."""
    served = make(harness, tiny, prefix_cache=False, max_num_requests=6, kv_cache_bytes=16 * BLOCK * KV_BYTES)
    alone = make(harness, tiny, prefix_cache=False)
    served.submit("brings it", [7], [("r6", 1.0)], max_tokens=1)
    served.run()
    options = {"max_tokens": 16, "temperature": 1.0}
    found = members(served, "g", 5, [("r6", 1.0)], **options)
    for _ in range(6):
        served.engine.step()
    served.engine.cancel("test", "g-0")
    served.run()
    singles = members(alone, "g", 5, [("r6", 1.0)], grouped=False, **options)
    alone.run()
    assert [answer.tokens for answer in found[1:]] == [answer.tokens for answer in singles[1:]]
    stats = served.engine.stats()
    assert sum(step.preemptions for step in stats.steps) > 0
    assert stats.kv_blocks_cached == 0
    # The first has the prompt's log-probabilities, and the others its blocks.
    scored = served.submit("s-0", PROMPT, group="s", max_tokens=2, prompt_logprobs=0)
    other = served.submit("s-1", PROMPT, group="s", max_tokens=2)
    served.run()
    assert (len(scored.prompt_logprobs), other.prompt_logprobs) == (len(PROMPT) - 1, [])
    assert other.times.cached_prompt_tokens == WHOLE
    assert scored.tokens == other.tokens
