"""Level (i): fp32 activations on dequantised weights answer token for token as transformers + PEFT does.

Mixed batches of eight adapters (ranks 4 to 32), compositions and the base, with staggered arrivals,
chunked prefill, swapping and preemption, against one request at a time in PEFT.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loraplex_kernels import lora
from loraplex_server.adapters.spec.peft_config import LoraSettings
from loraplex_server.model.run.kv_cache import block_bytes

ARCHITECTURES = [
    "Llama",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3")
    ),
]
MAX_TOKENS = 12
BLOCK = 4
# A composition of two, one of three with a negative weight, and a single adapter at half weight.
COMPOSITIONS = [
    (("r6", 1.0), ("r16", 1.5)),
    (("r14", 0.7), ("r7", -0.4), ("r32", 0.6)),
    (("r12", 0.5),),
]

Requests = list[tuple[str, tuple[int, ...], tuple[tuple[str, float], ...]]]


@pytest.fixture(scope="module")
def requests(adapter_names: list[str]) -> Requests:
    """Two prompts for each adapter, for each composition and for the base, shuffled."""
    random_ = random.Random(3)
    choices: list[tuple[tuple[str, float], ...]] = [((name, 1.0),) for name in adapter_names]
    choices += [*COMPOSITIONS, ()]
    prompts = [tuple(random_.randrange(3, 211) for _ in range(length)) for length in (5, 33)]
    found = [
        (f"{index}-{len(prompt)}", prompt, adapters)
        for index, adapters in enumerate(choices)
        for prompt in prompts
    ]
    random_.shuffle(found)
    return found


@pytest.fixture(scope="module")
def expected(
    oracle: Callable[[str, str], Any], requests: Requests
) -> Callable[[str, str], dict[str, tuple[list[int], torch.Tensor]]]:
    """The oracle's answers, checked to tell adapters apart before anything is compared with them."""
    made: dict[tuple[str, str], dict[str, tuple[list[int], torch.Tensor]]] = {}

    def make(architecture: str, quantization: str) -> dict[str, tuple[list[int], torch.Tensor]]:
        key = architecture, quantization
        if key not in made:
            judge = oracle(architecture, quantization)
            made[key] = {
                name: judge.generate(prompt, adapters, MAX_TOKENS) for name, prompt, adapters in requests
            }
            _assert_telling(requests, made[key])
        return made[key]

    return make


def _assert_telling(requests: Requests, answers: dict[str, tuple[list[int], torch.Tensor]]) -> None:
    by_prompt: dict[tuple[int, ...], dict[tuple[tuple[str, float], ...], list[int]]] = {}
    for name, prompt, adapters in requests:
        by_prompt.setdefault(prompt, {})[adapters] = answers[name][0]
    for prompt, found in by_prompt.items():
        changed = [tokens != found[()] for adapters, tokens in found.items() if adapters]
        assert sum(changed) >= len(changed) / 2, f"too few adapters change the answer to {prompt[:3]}…"
        for one, other in itertools.combinations(found, 2):
            assert found[one] != found[other], f"{one} and {other} answer alike"


def _serve(harness: Any, tiny_model: Any, quantization: str, requests: Requests) -> Any:
    """All requests through one engine: tight in tokens, KV blocks and adapter slots; arrivals staggered."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model.base)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_block = block_bytes([(2, width)] * config.num_hidden_layers, BLOCK, torch.float32)
    engine = harness(
        tiny_model,
        quantization,
        # Room for 40 of the 90 blocks that eight requests of 45 tokens need: some must be preempted.
        scheduler={
            "max_batch_tokens": 24,
            "max_num_requests": 8,
            "kv_block_size": BLOCK,
            "kv_cache_bytes": 40 * per_block,
        },
        adapters={"max_on_device": 5},
    )
    for index, (name, prompt, adapters) in enumerate(requests):
        engine.submit(name, prompt, adapters, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=3)
        if index % 3 == 2:
            engine.engine.step()
    engine.run()
    return engine


def _differences(requests: Requests, answers: Any, expected: Any) -> list[str]:
    """Requests whose tokens differ from the oracle's."""
    return [name for name, _, _ in requests if answers[name].tokens != expected[name][0]]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixed_batch_equals_peft(
    architecture: str,
    quantization: str,
    tiny: Any,
    harness: Any,
    expected: Any,
    requests: Requests,
) -> None:
    truth = expected(architecture, quantization)
    served = _serve(harness, tiny(architecture), quantization, requests)
    assert _differences(requests, served.answers, truth) == []
    stats = served.engine.stats()
    preemptions = sum(step.preemptions for step in stats.steps)
    worst = max(_logit_error(served.answers[name], *truth[name]) for name, _, _ in requests)
    print(
        f"\nlevel (i) {architecture} {quantization}: {len(requests)} requests token for token as PEFT, "
        f"max |Δlogprob| {worst:.1e} of the largest logit, {preemptions} preemptions, "
        f"{sum(swap.kind == 'evict_device' for swap in stats.swaps)} evictions"
    )
    assert worst <= 1e-4
    assert preemptions > 0
    assert any(step.prefill_tokens and step.decode_tokens for step in stats.steps)
    assert max(step.adapters for step in stats.steps) >= 4


def _logit_error(answer: Any, tokens: list[int], logits: torch.Tensor) -> float:
    """Largest |Δ log-probability| over chosen and best tokens, as a share of the largest logit."""
    logprobs = logits.log_softmax(dim=-1)
    worst = 0.0
    for position, found in enumerate(answer.logprobs):
        pairs = [(found.token_id, found.logprob), *((top.token_id, top.logprob) for top in found.top)]
        for token, value in pairs:
            worst = max(worst, abs(value - logprobs[position, token].item()))
    return worst / logits.abs().max().item()


def test_swapped_adapters_are_noticed(tiny: Any, harness: Any, expected: Any, requests: Requests) -> None:
    """A mutation: were two tenants' adapters exchanged, every answer of both would differ."""
    truth = expected("Llama", "nf4")
    exchanged = {"r6": "r32", "r32": "r6"}
    mutated = [
        (name, prompt, tuple((exchanged.get(adapter, adapter), weight) for adapter, weight in adapters))
        for name, prompt, adapters in requests
    ]
    served = _serve(harness, tiny("Llama"), "nf4", mutated)
    touched = [name for name, _, adapters in requests if any(a in exchanged for a, _ in adapters)]
    assert sorted(_differences(requests, served.answers, truth)) == sorted(touched)


def test_dropped_scaling_is_noticed(
    tiny: Any, harness: Any, expected: Any, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutation: without alpha / r folded into B, adapters whose scale is not 1 answer otherwise."""
    truth = expected("Llama", "none")
    monkeypatch.setattr(LoraSettings, "scale_of", lambda settings, path: 1.0)
    served = _serve(harness, tiny("Llama"), "none", requests)
    different = _differences(requests, served.answers, truth)
    unscaled = {"r6"}
    scaled = [name for name, _, adapters in requests if {a for a, _ in adapters} - unscaled]
    assert set(different) <= set(scaled)
    assert len(different) >= len(scaled) / 2


@pytest.mark.parametrize("site", [0, 1, 3, 4])
def test_skipped_site_is_noticed(
    site: int, tiny: Any, harness: Any, expected: Any, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutation: one site of one layer without its adapters (q·k·v, o, gate·up, down of layer 0, and on)."""
    truth = expected("Llama", "none")
    original = lora.apply
    calls: list[int] = []

    def skip(x: Any, y: Any, pool: Any, lora_site: Any, batch: Any) -> None:
        first_entries = sorted({0, 3, 4, 6, 7, 10, 11, 13})
        calls.append(lora_site.first_entry)
        if lora_site.first_entry != first_entries[site]:
            original(x, y, pool, lora_site, batch)

    monkeypatch.setattr(lora, "apply", skip)
    served = _serve(harness, tiny("Llama"), "none", requests)
    assert set(calls) == {0, 3, 4, 6, 7, 10, 11, 13}
    assert len(_differences(requests, served.answers, truth)) >= 8
