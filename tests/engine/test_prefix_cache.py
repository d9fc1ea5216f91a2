"""The prefix cache on a real engine: level (i), the same tokens with it and without it, and whose it is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest

from loraplex_server.engine import sequence as sequence_module

BLOCK = 4
PROMPT = tuple(random.Random(1).choices(range(3, 211), k=30))
WHOLE = (len(PROMPT) - 1) // BLOCK * BLOCK
GREEDY: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}


def cached(answer: Any) -> int:
    """Prompt tokens that were not computed for an answer."""
    return int(answer.times.cached_prompt_tokens)


def ask(served: Any, name: str, prompt: Seq[int], adapters: Any = (), **options: Any) -> Any:
    """One request with the engine to itself."""
    answer = served.submit(name, prompt, adapters, **{**GREEDY, **options})
    served.run()
    assert answer.error is None, answer.error
    return answer


def make(harness: Any, model: Any, quantization: str = "none", **scheduler: Any) -> Any:
    return harness(model, quantization, scheduler={"kv_block_size": BLOCK, **scheduler})


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        ("Llama", "none"),
        ("Llama", "nf4"),
        pytest.param("Llama", "int4", marks=pytest.mark.slow),
        # A window of 9: blocks before it are never read again, and kept all the same.
        ("Mistral", "none"),
        pytest.param("Gemma2", "none", marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_same_with_and_without(
    architecture: str, quantization: str, tiny: Any, harness: Any
) -> None:
    """Conversations that branch, over adapters and compositions, in too little room: hits, evictions and
    preemptions among them."""
    rng = random.Random(4)
    roots = [tuple(rng.randrange(3, 211) for _ in range(rng.randint(20, 30))) for _ in range(2)]
    owners = [(), (("r14", 1.0),), (("r6", 1.0), ("r16", -0.5))]
    requests = []
    for index in range(60):
        root = rng.choice(roots)
        tail = tuple(rng.randrange(3, 211) for _ in range(rng.randint(1, 6)))
        requests.append((f"q{index}", root[: rng.randint(8, len(root))] + tail, rng.choice(owners)))
    answers, tokens, hits = {}, {}, {}
    for name, on in {"without": False, "with": True}.items():
        width = tiny_kv_bytes(tiny(architecture).base)
        served = make(
            harness,
            tiny(architecture),
            quantization,
            max_num_requests=6,
            max_batch_tokens=24,
            kv_cache_bytes=34 * BLOCK * width,
            prefix_cache=on,
        )
        for index, (request, prompt, adapters) in enumerate(requests):
            served.submit(request, prompt, adapters, max_tokens=12, ignore_eos=True)
            if index % 2:
                served.engine.step()
        served.run()
        answers[name] = {request: served.answers[request].tokens for request, _, _ in requests}
        stats = served.engine.stats()
        tokens[name] = sum(step.prefill_tokens for step in stats.steps)
        hits[name] = stats.prefix_hits
        if name == "with":
            assert sum(step.preemptions for step in stats.steps) > 0
            assert stats.prefix_hits < stats.prefix_queries == sum(len(prompt) for _, prompt, _ in requests)
            assert 0 < stats.kv_blocks_cached <= stats.kv_blocks
            taken = sum(len(prompt) + 12 for _, prompt, _ in requests) - stats.prefix_hits
            assert taken > stats.kv_blocks * BLOCK, "nothing had to be evicted"
    assert answers["with"] == answers["without"]
    assert hits["with"] > 200
    assert hits["without"] == 0
    assert tokens["with"] < tokens["without"] - hits["with"] / 2
    print(f"\nlevel (i) {architecture} {quantization}: {hits['with']} prompt tokens cached, answers the same")


def tiny_kv_bytes(base: Path) -> int:
    """Bytes of the keys and values of a token in fp32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4


def test_a_prompt_is_found_by_the_same_adapters_in_the_same_order_and_by_no_others(
    tiny: Any, harness: Any
) -> None:
    served = make(harness, tiny("Llama"))
    owners = [
        (),
        (("r6", 1.0),),
        (("r6", 0.5),),
        (("r8", 1.0),),
        (("r6", 1.0), ("r8", 1.0)),
        (("r8", 1.0), ("r6", 1.0)),
    ]
    for turn in range(2):
        for index, adapters in enumerate(owners):
            assert cached(ask(served, f"{turn}-{index}", PROMPT, adapters)) == turn * WHOLE


def test_tenants_never_share(tiny: Any, harness: Any) -> None:
    served = make(harness, tiny("Llama"))
    for adapters in ((), (("r6", 1.0),)):
        for tenant, expected in (("one", 0), ("two", 0), ("one", WHOLE), ("two", WHOLE)):
            answer = ask(served, "q", PROMPT, adapters, tenant=tenant)
            assert cached(answer) == expected


def test_a_request_may_keep_out_of_it(tiny: Any, harness: Any) -> None:
    """It then leaves nothing and takes nothing."""
    served = make(harness, tiny("Llama"))
    ask(served, "a", PROMPT, cache_prefix=False)
    assert cached(ask(served, "b", PROMPT)) == 0
    assert cached(ask(served, "c", PROMPT, cache_prefix=False)) == 0
    assert cached(ask(served, "d", PROMPT)) == WHOLE
    assert served.engine.stats().prefix_queries == 2 * len(PROMPT)


def test_it_can_be_turned_off(tiny: Any, harness: Any) -> None:
    served = make(harness, tiny("Llama"), prefix_cache=False)
    assert [cached(ask(served, name, PROMPT)) for name in "ab"] == [0, 0]
    stats = served.engine.stats()
    assert (stats.kv_blocks_cached, stats.prefix_queries, stats.prefix_hits) == (0, 0, 0)


def test_the_next_turn_of_a_conversation_finds_the_answer_too(tiny: Any, harness: Any) -> None:
    served, alone = make(harness, tiny("Llama")), make(harness, tiny("Llama"), prefix_cache=False)
    adapters = [("r14", 1.0)]
    history: list[int] = list(PROMPT[:9])
    for turn in range(4):
        before = len(history)
        answer = ask(served, f"t{turn}", history, adapters)
        assert answer.tokens == ask(alone, f"t{turn}", history, adapters).tokens
        # The last token of an answer was sampled and never computed.
        assert cached(answer) == (0 if not turn else (before - 4) // BLOCK * BLOCK)
        history += [*answer.tokens, 5 + turn, 6, 7]


def test_equal_prompts_at_the_same_time_are_all_right(tiny: Any, harness: Any) -> None:
    served = make(harness, tiny("Llama"), max_num_requests=4, max_batch_tokens=16)
    answers = [served.submit(f"q{index}", PROMPT, [("r6", 1.0)], **GREEDY) for index in range(9)]
    served.run()
    expected = ask(make(harness, tiny("Llama"), prefix_cache=False), "q", PROMPT, [("r6", 1.0)]).tokens
    assert all(answer.tokens == expected for answer in answers)
    # The others wait for what the first computes.
    assert [cached(answer) for answer in answers] == [0, *8 * [WHOLE]]


def test_a_preempted_request_goes_on_from_its_own_blocks(tiny: Any, harness: Any) -> None:
    served, alone = make(harness, tiny("Llama")), make(harness, tiny("Llama"), prefix_cache=False)
    answer = served.submit("q", PROMPT, **GREEDY)
    for _ in range(4):
        served.engine.step()
    scheduler = served.engine.scheduler
    known = len(scheduler.running[0].token_ids)
    served.engine.stats()
    scheduler._preempt(scheduler.running[0])
    served.engine.step()
    (step,) = served.engine.stats().steps
    assert step.prefill_tokens + step.decode_tokens == known - (known - 1) // BLOCK * BLOCK
    served.run()
    assert answer.tokens == ask(alone, "q", PROMPT).tokens
    assert (cached(answer), answer.times.preemptions) == (0, 1)


def test_new_weights_under_one_name_never_get_the_old_ones_keys_and_values(
    tiny: Any, harness: Any, oracle: Any, tmp_path: Path
) -> None:
    """Registered, served, unloaded and registered anew with other weights; and then the first once more."""
    contents = {name: tiny("Llama").adapters / name for name in ("r6", "r14")}
    served = harness(
        tiny("Llama"),
        scheduler={"kv_block_size": BLOCK},
        adapters={"folders": (), "roots": (tmp_path,)},
    )
    store = served.engine.adapters
    for turn, (content, expected) in enumerate([("r6", 0), ("r14", 0), ("r6", WHOLE), ("r14", WHOLE)]):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        shutil.copytree(contents[content], tmp_path / "adapter")
        store.intake.register("tenant", tmp_path / "adapter")
        answer = ask(served, f"q{turn}", PROMPT, [("tenant", 1.0)])
        truth, _ = oracle("Llama", "none").generate(PROMPT, [(content, 1.0)], GREEDY["max_tokens"])
        assert answer.tokens == truth
        assert cached(answer) == expected
        gone: list[bool] = []
        store.unload("tenant", lambda gone=gone: gone.append(True))
        while not gone:
            store.poll()
            store.wait_event(0.05)


def test_what_was_computed_before_a_cancellation_is_kept(tiny: Any, harness: Any) -> None:
    served = make(harness, tiny("Llama"), max_batch_tokens=10)
    served.submit("q", PROMPT, **GREEDY)
    served.engine.step()
    served.engine.step()
    served.engine.cancel("test", "q")
    assert cached(ask(served, "again", PROMPT)) == 20


def test_a_prompt_is_hashed_once_however_long_it_waits(
    tiny: Any, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[bytes] = []
    original = sequence_module.block_key

    def count(parent: bytes, tokens: Seq[int], namespace: bytes) -> bytes:
        counted.append(namespace)
        return original(parent, tokens, namespace)

    monkeypatch.setattr(sequence_module, "block_key", count)
    # Room for one request at a time: the second is looked up at every step, and preempted by none.
    width = tiny_kv_bytes(tiny("Llama").base)
    served = make(harness, tiny("Llama"), kv_cache_bytes=11 * BLOCK * width, max_batch_tokens=8)
    for name, first in (("a", 5), ("b", 6)):
        served.submit(name, (first, *PROMPT), **GREEDY)
    served.run()
    computed = len(PROMPT) + GREEDY["max_tokens"]
    assert len(counted) == 2 * (computed // BLOCK)


def test_a_prompt_that_is_being_computed_is_waited_for_as_far_as_it_is_shared(
    tiny: Any, harness: Any
) -> None:
    """In chunks of 8 tokens who shares 12 begins when these are there; who shares none, or may not, now."""
    served = make(harness, tiny("Llama"), max_batch_tokens=8, max_num_requests=4)
    options = {"max_tokens": 2, "ignore_eos": True}
    served.submit("first", PROMPT, **options)
    served.engine.step()
    shares = served.submit("shares", (*PROMPT[:12], *PROMPT[:12]), **options)
    running = served.engine.scheduler.running
    served.engine.step()
    assert [one.request.request_id for one in running] == ["first"]
    served.engine.step()
    served.engine.step()
    assert {one.request.request_id for one in running} == {"first", "shares"}
    served.run()
    assert cached(shares) == 12
    alone = make(harness, tiny("Llama"), prefix_cache=False)
    assert shares.tokens == ask(alone, "q", (*PROMPT[:12], *PROMPT[:12]), **options).tokens
    for name, prompt, more in (
        ("other", PROMPT[::-1], {}),
        ("tenant", PROMPT, {"tenant": "two"}),
        ("apart", PROMPT, {"cache_prefix": False}),
    ):
        served = make(harness, tiny("Llama"), max_batch_tokens=40)
        served.submit("first", PROMPT, **options)
        served.submit(name, prompt, **options, **more)
        served.engine.step()
        assert len(served.engine.scheduler.running) == 2
        served.run()


@pytest.mark.parametrize(("places", "expected"), [(2, ["first"]), (3, ["first", "other"])])
def test_who_waits_for_what_is_being_computed_keeps_a_place(
    places: int, expected: list[str], tiny: Any, harness: Any
) -> None:
    served = make(harness, tiny("Llama"), max_batch_tokens=40, max_num_requests=places)
    for name, prompt in (("first", PROMPT), ("alike", PROMPT), ("other", PROMPT[::-1])):
        served.submit(name, prompt, **GREEDY)
    served.engine.step()
    assert [one.request.request_id for one in served.engine.scheduler.running] == expected
    served.run()
    assert cached(served.answers["alike"]) == WHOLE


def logprobs(answer: Any) -> dict[int, float]:
    """Of the first token: those of the most probable ones."""
    return {top.token_id: top.logprob for top in answer.logprobs[0].top}


def test_in_half_precision_a_hit_is_as_exact_as_peft(tiny: Any, harness: Any, oracle: Any) -> None:
    """Level (ii): errors of the logits against fp32, of answers that found their prompt in the cache."""
    exact, peer = oracle("Llama", "nf4"), oracle("Llama", "nf4", "bfloat16")
    served = harness(tiny("Llama"), "nf4", scheduler={"kv_block_size": BLOCK}, model={"dtype": "bfloat16"})
    rng = random.Random(6)
    errors: dict[str, list[float]] = {"cold": [], "hit": [], "peft": []}
    for index in range(8):
        prompt, owner = rng.choices(range(3, 211), k=30), rng.choice([None, "r6", "r14"])
        truth, theirs = (judge.logits(prompt, owner)[-1].log_softmax(-1) for judge in (exact, peer))
        for turn in ("cold", "hit"):
            uses = [(owner, 1.0)] if owner else []
            answer = ask(served, f"{turn}{index}", prompt, uses, max_tokens=1, logprobs=20)
            assert cached(answer) == (WHOLE if turn == "hit" else 0)
            found = logprobs(answer)
            errors[turn] += [value - float(truth[token]) for token, value in found.items()]
        errors["peft"] += [float(theirs[token] - truth[token]) for token in found]
    rms = {name: (sum(value**2 for value in found) / len(found)) ** 0.5 for name, found in errors.items()}
    print(f"\nlevel (ii) bf16 nf4: rms error of log-probabilities {rms}")
    assert 0 < rms["hit"] <= 1.5 * rms["peft"]


def test_a_cache_in_8_bits_answers_alike_with_and_without_a_hit(tiny: Any, harness: Any) -> None:
    """Attention reads keys and values of the current chunk from the cache, like all earlier ones."""
    served = make(harness, tiny("Llama"), kv_cache_dtype="fp8")
    for index, owner in enumerate(([], [("r6", 1.0)], [("r14", 1.0)])):
        cold, hit = (ask(served, f"{turn}{index}", PROMPT, owner, logprobs=20) for turn in "ab")
        assert (cached(cold), cached(hit)) == (0, WHOLE)
        assert cold.tokens == hit.tokens
        assert logprobs(cold) == pytest.approx(logprobs(hit), abs=1e-4)
