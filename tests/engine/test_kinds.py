"""Level (i) for the methods beyond plain LoRA: each alone and all in one batch, token for token as PEFT.

PEFT keeps one method a model, so each adapter has an oracle of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

MAX_TOKENS = 10
KINDS = ("dora", "dora_rs", "ia3", "ia3_outputs", "bias", "prompt", "p_tuning", "activated", "plain")
INVOCATION = (7, 9)
ARCHITECTURES = [
    "Llama",
    # Qwen2 has biases, which DoRA must not scale and IA3 must; Phi-3 has fused projections.
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen2", "Phi3", "Gemma2")),
]

Requests = list[tuple[str, tuple[int, ...], str | None]]


def _configuration(kind: str, attention: list[str], mlp: list[str]) -> Any:
    from peft import IA3Config, LoraConfig, PromptEncoderConfig, PromptTuningConfig

    match kind:
        case "dora":
            return LoraConfig(r=6, lora_alpha=12, use_dora=True, target_modules=attention + mlp)
        case "dora_rs":
            return LoraConfig(
                r=9, lora_alpha=5, use_dora=True, use_rslora=True, target_modules=[attention[0], mlp[-1]]
            )
        case "ia3":
            outputs = attention[1:3] if len(attention) > 2 else attention[:1]
            return IA3Config(target_modules=[*outputs, "down_proj"], feedforward_modules=["down_proj"])
        case "ia3_outputs":
            return IA3Config(target_modules=attention + mlp, feedforward_modules=[])
        case "bias":
            return LoraConfig(r=5, lora_alpha=10, lora_bias=True, target_modules=[attention[0], mlp[0]])
        case "prompt":
            return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=11)
        case "p_tuning":
            return PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=48)
        case "activated":
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=8,
                lora_alpha=32,
                target_modules=attention + mlp,
                alora_invocation_tokens=list(INVOCATION),
            )
    return LoraConfig(r=8, lora_alpha=24, target_modules=attention + mlp)


@pytest.fixture(scope="module")
def saved(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """One adapter of each kind, made by PEFT with random values; the folder that holds each one's folder."""
    made: dict[str, dict[str, Path]] = {}

    def make(architecture: str) -> dict[str, Path]:
        if architecture in made:
            return made[architecture]
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        fused = architecture == "Phi3"
        attention = ["qkv_proj", "o_proj"] if fused else ["q_proj", "k_proj", "v_proj", "o_proj"]
        mlp = ["gate_up_proj", "down_proj"] if fused else ["gate_proj", "up_proj", "down_proj"]
        generator = torch.Generator().manual_seed(5)
        folders = {}
        for kind in KINDS:
            base = AutoModelForCausalLM.from_pretrained(tiny(architecture).base, dtype=torch.float32)
            model = get_peft_model(base, _configuration(kind, attention, mlp))
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_A" in name:
                    parameter.data.copy_(noise * parameter.shape[1] ** -0.5)
                elif "lora_B" in name:
                    parameter.data.copy_(noise * 0.1)
                elif "lora_magnitude_vector" in name:
                    parameter.data.mul_(1 + 0.3 * noise)
                elif "ia3_l" in name:
                    parameter.data.copy_(1 + 0.5 * noise)
                elif "prompt_encoder" in name:
                    parameter.data.copy_(noise * (1.0 if "embedding" in name else 0.3))
            folders[kind] = tmp_path_factory.mktemp(f"{architecture}-{kind}")
            model.save_pretrained(folders[kind] / kind)
        made[architecture] = folders
        return folders

    return make


@pytest.fixture(scope="module")
def requests() -> Requests:
    random_ = random.Random(8)
    found: Requests = []
    for length in (4, 29):
        drawn = [random_.randrange(10, 211) for _ in range(length)]
        # Two invocations in the long prompt, the last of which counts; one at the end of the short.
        for at in (length - 2, 3) if length > 4 else (length - 2,):
            drawn[at : at + 2] = INVOCATION
        prompt = tuple(drawn)
        found += [(f"{kind}-{length}", prompt, kind) for kind in (*KINDS, None)]
    random_.shuffle(found)
    return found


def _truth(
    judge: Any, base: Path, folders: dict[str, Path], quantization: str, requests: Requests
) -> dict[str, tuple[list[int], torch.Tensor]]:
    """What transformers + PEFT answers, checked to differ from adapter to adapter."""
    answers = {}
    for kind in (*KINDS, None):
        oracle = judge(base, folders[kind or "plain"], quantization)
        for name, prompt, adapter in requests:
            if adapter == kind:
                uses = [] if kind is None else [(kind, 1.0)]
                answers[name] = oracle.generate(prompt, uses, MAX_TOKENS)
    for length in (4, 29):
        found = {name: answers[name][0] for name, prompt, _ in requests if len(prompt) == length}
        for one, other in combinations(found, 2):
            assert found[one] != found[other], f"{one} and {other} answer alike"
    return answers


@pytest.mark.parametrize("quantization", ["none", "nf4", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_in_one_batch_equals_peft(
    architecture: str,
    quantization: str,
    tiny: Any,
    harness: Any,
    saved: Any,
    requests: Requests,
    judge: Any,
) -> None:
    folders = saved(architecture)
    truth = _truth(judge, tiny(architecture).base, folders, quantization, requests)
    served = harness(
        tiny(architecture),
        quantization,
        # Chunked prefill, and adapters that come and go.
        scheduler={"max_batch_tokens": 16, "max_num_requests": 6, "kv_block_size": 4},
        adapters={"folders": tuple(folders.values()), "max_on_device": 4},
    )
    for name, prompt, adapter in requests:
        uses = [] if adapter is None else [(adapter, 1.0)]
        served.submit(name, prompt, uses, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    served.run()
    assert {name: served.answers[name].tokens for name, _, _ in requests} == {
        name: tokens for name, (tokens, _) in truth.items()
    }
    worst = 0.0
    for name, (tokens, logits) in truth.items():
        exact = logits.log_softmax(-1)[range(len(tokens)), tokens]
        found = torch.tensor([step.logprob for step in served.answers[name].logprobs])
        worst = max(worst, float((exact - found).abs().max() / logits.abs().max()))
    print(f"\nlevel (i) {architecture} {quantization}: {', '.join(KINDS)}: max |Δlogprob| {worst:.1e}")
    assert worst <= 1e-4


def test_an_adapter_that_is_not_invoked_does_nothing(tiny: Any, harness: Any, saved: Any) -> None:
    served = harness(tiny("Llama"), "none", adapters={"folders": (saved("Llama")["activated"],)})
    prompts = {"without": (50, 60, 9, 7, 70), "with": (50, 60, 7, 9, 70)}
    answers = {
        (name, bool(uses)): served.submit(f"{name}{uses}", prompt, uses, max_tokens=8, ignore_eos=True)
        for name, prompt in prompts.items()
        for uses in ((), (("activated", 1.0),))
    }
    served.run()
    assert answers["without", True].tokens == answers["without", False].tokens
    assert answers["with", True].tokens != answers["with", False].tokens


def test_a_soft_prompt_counts_towards_the_longest_sequence(tiny: Any, harness: Any, saved: Any) -> None:
    served = harness(
        tiny("Llama"),
        "none",
        scheduler={"max_model_len": 20},
        adapters={"folders": (saved("Llama")["prompt"],)},
    )
    fits = served.submit("fits", (5,) * 8, [("prompt", 1.0)], max_tokens=8, ignore_eos=True)
    long = served.submit("long", (5,) * 9, [("prompt", 1.0)], max_tokens=8, ignore_eos=True)
    negative = served.submit("negative", (5, -1), [("prompt", 1.0)], max_tokens=8)
    served.run()
    assert (len(fits.tokens), fits.finish) == (1, "length")
    assert "20 tokens with the adapter's soft prompt" in long.error.message
    assert "outside the vocabulary" in negative.error.message
    assert served.engine.adapters.references() == 0


def test_a_pairs_bias_is_weighted_in_a_composition(tiny: Any, harness: Any, saved: Any, judge: Any) -> None:
    folders, model = saved("Llama"), tiny("Llama")
    adapters, prompt = [("bias", 0.5), ("plain", -0.75)], (5, 17, 100, 42)
    oracle = judge(model.base, folders["bias"], "none")
    plain = judge(model.base, folders["plain"], "none")
    layers = dict(oracle._model.named_modules())
    with torch.inference_mode():
        for layer in list(layers.values()):
            if hasattr(layer, "lora_A"):
                bias = layer.lora_B["bias"].bias * layer.scaling["bias"]
                layer.base_layer.weight.data = layer.base_layer.weight + 0.5 * layer.get_delta_weight("bias")
                layer.base_layer.bias = torch.nn.Parameter(0.5 * bias)
        for path, layer in plain._model.named_modules():
            if hasattr(layer, "lora_A"):
                target = layers[path]
                target = getattr(target, "base_layer", target)
                target.weight.data = target.weight - 0.75 * layer.get_delta_weight("plain")
        with oracle._model.disable_adapter():
            expected, _ = oracle._generate(prompt, MAX_TOKENS)
    served = harness(model, "none", adapters={"folders": tuple(folders.values())})
    answer = served.submit("a", prompt, adapters, max_tokens=MAX_TOKENS, ignore_eos=True)
    alone = served.submit("b", prompt, [("plain", -0.75)], max_tokens=MAX_TOKENS, ignore_eos=True)
    served.run()
    assert answer.tokens == expected
    assert alone.tokens != expected


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt"])
@pytest.mark.parametrize("uses", [[(None, 0.5)], [(None, 1.0), ("plain", 1.0)]])
def test_what_scales_the_base_stands_alone_at_weight_1(
    kind: str, uses: list[tuple[str | None, float]], tiny: Any, harness: Any, saved: Any
) -> None:
    folders = saved("Llama")
    served = harness(tiny("Llama"), "none", adapters={"folders": tuple(folders.values())})
    named = [(name or kind, weight) for name, weight in uses]
    answer = served.submit("a", (5, 6), named, max_tokens=2)
    assert answer.error.code == "FAILED_PRECONDITION"
    assert "alone, at weight 1" in answer.error.message
    assert served.engine.adapters.references() == 0


def test_in_8_bits_vectors_stay_exact_and_low_rank_pairs_near(
    tiny: Any, harness: Any, saved: Any, requests: Requests
) -> None:
    """IA3 and soft prompts hold no low-rank pair; DoRA's and a bias's vectors lie beside one in 8 bits."""
    folders = tuple(saved("Llama").values())
    answers = {}
    for device_dtype in ("auto", "int8"):
        served = harness(
            tiny("Llama"),
            "none",
            adapters={"folders": folders, "max_on_device": 4, "device_dtype": device_dtype},
        )
        for name, prompt, adapter in requests:
            uses = [] if adapter is None else [(adapter, 1.0)]
            served.submit(name, prompt, uses, max_tokens=1, ignore_eos=True, logprobs=3)
            # One after the other: in a batch, who stands beside whom moves the last bits.
            served.run()
        answers[device_dtype] = served.answers
    for name, _, adapter in requests:
        (plain,), (small,) = (answers[dtype][name].logprobs for dtype in ("auto", "int8"))
        if adapter in (None, "ia3", "ia3_outputs", "prompt", "p_tuning"):
            assert answers["auto"][name].tokens == answers["int8"][name].tokens
            assert small.logprob == pytest.approx(plain.logprob, abs=1e-6)
        else:
            assert small.logprob == pytest.approx(plain.logprob, abs=0.15)
