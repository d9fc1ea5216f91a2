"""Log-probabilities of prompts on a real engine: level (i), those of transformers + PEFT in fp32."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

BLOCK = 4
OWNERS = [None, "r6", "r16", "r14"]
KV_BYTES = 2 * 2 * 2 * 16 * 4
MOST = 5


def uses(owner: str | None) -> list[tuple[str, float]]:
    return [] if owner is None else [(owner, 1.0)]


def assert_scores(answer: Any, prompt: tuple[int, ...], logits: torch.Tensor, top: int) -> None:
    """Each token of the prompt after the first has its log-probability and the best `top`, best first."""
    scores = answer.prompt_logprobs
    assert [score.token_id for score in scores] == list(prompt[1:])
    logprobs = logits.log_softmax(-1)
    near = 1e-4 * logits.abs().max().item()
    for score, exact in zip(scores, logprobs, strict=False):
        assert score.logprob == pytest.approx(exact[score.token_id].item(), abs=near)
        best = [other.logprob for other in score.top]
        assert best == pytest.approx(exact.topk(top).values.tolist(), abs=near)
        assert best == pytest.approx([exact[other.token_id].item() for other in score.top], abs=near)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """`plans(served)`: the list that every plan its engine launches is added to."""

    def watch(served: Any) -> list[Any]:
        launched: list[Any] = []
        launch = served.engine._runner.launch

        def watched(plan: Any) -> Any:
            launched.append(plan)
            return launch(plan)

        monkeypatch.setattr(served.engine._runner, "launch", watched)
        return launched

    return watch


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_prompts_score_as_with_peft(
    quantization: str, tiny: Any, oracle: Any, harness: Any, plans: Any
) -> None:
    """Scored and plain requests together, with and without adapters, in too little room for all: few tokens
    are scored in a step, none twice, and what was preempted goes on where it was."""
    rng = random.Random(3)
    judge = oracle("Llama", quantization)
    served = harness(
        tiny("Llama"),
        quantization,
        scheduler={
            "kv_block_size": BLOCK,
            "max_batch_tokens": 16,
            "max_num_requests": 6,
            "max_scored_tokens": MOST,
            "kv_cache_bytes": 24 * BLOCK * KV_BYTES,
            # Whose turn it is shall not depend on the clock.
            "fair_aging_s": 1e6,
        },
    )
    for owner in OWNERS[1:3]:
        served.submit(f"brings {owner}", [7], uses(owner), max_tokens=1)
    served.run()
    launched = plans(served)
    prompts = {str(at): tuple(rng.choices(range(3, 211), k=rng.randint(1, 26))) for at in range(16)}
    for name, prompt in prompts.items():
        at = int(name)
        top = None if at % 4 == 3 else at % 3
        served.submit(
            name,
            prompt,
            uses(OWNERS[at % 3]),
            max_tokens=0 if at % 5 == 2 and top is not None else 14,
            ignore_eos=True,
            prompt_logprobs=top,
        )
        served.engine.step()
    served.run()
    scored = 0
    for name, prompt in prompts.items():
        at, answer = int(name), served.answers[name]
        owner, top = OWNERS[at % 3], None if at % 4 == 3 else at % 3
        tokens, _ = judge.generate(prompt, uses(owner), 14)
        assert (answer.error, answer.finish) == (None, "length")
        if top is None:
            assert answer.prompt_logprobs == []
        else:
            scored += len(prompt) - 1
            assert_scores(answer, prompt, judge.logits(prompt, owner), top)
        assert answer.tokens == ([] if at % 5 == 2 and top is not None else tokens)
    counts = [len(plan.score_row) for plan in launched]
    assert max(counts) == MOST
    assert sum(counts) == scored
    assert sum(step.preemptions for step in served.engine.stats().steps) > 0
    print(f"\nlevel (i) Llama {quantization}: {scored} prompt tokens scored as PEFT scores them")


def test_who_is_scored_leaves_its_prompt_in_the_cache_and_takes_none_from_it(
    tiny: Any, harness: Any, plans: Any
) -> None:
    served = harness(tiny("Llama"), scheduler={"kv_block_size": BLOCK})
    prompt = tuple(range(20, 42))
    launched = plans(served)
    cached = []
    for name, top in (("first", 1), ("again", 1), ("plain", None)):
        answer = served.submit(name, prompt, max_tokens=3, ignore_eos=True, prompt_logprobs=top)
        served.run()
        cached.append(answer.times.cached_prompt_tokens)
    assert cached == [0, 0, 20]
    assert served.answers["first"].prompt_logprobs == served.answers["again"].prompt_logprobs
    assert served.answers["first"].tokens == served.answers["plain"].tokens
    assert sum(len(plan.score_row) for plan in launched) == 2 * 21
    stats = served.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (22, 20)


def test_scores_that_are_no_numbers_end_their_own_request(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"), scheduler={"max_scored_tokens": 8})
    prompt = tuple(range(20, 42))
    broken = served.submit("broken", prompt, [("r6", 1e38)], max_tokens=0, prompt_logprobs=1)
    beside = served.submit("beside", prompt, [("r6", 1.0)], max_tokens=0, prompt_logprobs=1)
    served.run()
    assert broken.error.code == "FAILED_PRECONDITION"
    assert "cannot be scored" in broken.error.message
    assert (beside.error, len(beside.prompt_logprobs)) == (None, 21)


def test_a_prompt_alone_is_scored_and_nothing_generated(tiny: Any, harness: Any) -> None:
    served = harness(tiny("Llama"))
    whole = served.submit("whole", range(20, 40), max_tokens=0, prompt_logprobs=2)
    single = served.submit("single", [7], max_tokens=0, prompt_logprobs=2)
    served.run()
    assert (whole.tokens, whole.finish, len(whole.prompt_logprobs)) == ([], "length", 19)
    assert (single.tokens, single.finish, single.prompt_logprobs) == ([], "length", [])
    assert whole.times.total_s >= whole.times.first_token_s > 0
