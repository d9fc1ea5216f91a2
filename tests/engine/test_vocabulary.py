"""Level (i) for adapters of the embedding, the head, the norms and whole weights, added tokens included: each
alone and all in one batch, token for token as PEFT answers with the file that it saved.
"""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

VOCABULARY, ADDED, MAX_TOKENS = 211, 3, 8
TRAINED = (5, 17, 100, 150)

# Kinds by name: PEFT's configuration, given the projections' names, and how it is saved.
KINDS: dict[str, tuple[Callable[[list[str], list[str]], Any], dict[str, Any]]] = {}
ADDING = ("added_copies", "added_lora", "added_rows", "added_plain")


def _kind(**saving: Any) -> Callable[[Callable[[list[str], list[str]], Any]], None]:
    def add(make: Callable[[list[str], list[str]], Any]) -> None:
        KINDS[make.__name__] = (make, saving)

    return add


@_kind()
def ends(attention: list[str], mlp: list[str]) -> Any:
    """Saved with copies of the base's tables, as PEFT does unasked."""
    from peft import LoraConfig

    return LoraConfig(
        r=5,
        lora_alpha=12,
        use_rslora=True,
        rank_pattern={"lm_head": 3},
        alpha_pattern={"embed_tokens": 7},
        target_modules=["embed_tokens", "lm_head", attention[0]],
    )


@_kind(save_embedding_layers=False)
def head(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=6, lora_alpha=6, target_modules=["lm_head"])


@_kind(save_embedding_layers=False)
def embedding(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", mlp[-1]])


@_kind()
def dora_ends(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["embed_tokens", "lm_head", attention[0]]
    )


@_kind()
def copies(attention: list[str], mlp: list[str]) -> Any:
    """`norm` names every norm, the first of the attention's projections has a bias in Qwen2."""
    from peft import LoraConfig

    saved = ["embed_tokens", "lm_head", "norm", attention[-2], mlp[-1]]
    return LoraConfig(r=4, lora_alpha=4, target_modules=[attention[-1]], modules_to_save=saved)


@_kind()
def embedding_copy(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, modules_to_save=["embed_tokens"])


@_kind()
def tied_copy(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=mlp,
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )


@_kind()
def rows(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, trainable_token_indices=list(TRAINED))


@_kind()
def uneven_rows(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    trained = {"embed_tokens": [9, *TRAINED], "lm_head": [3, 7, 120]}
    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, trainable_token_indices=trained)


@_kind()
def rows_alone(attention: list[str], mlp: list[str]) -> Any:
    from peft import TrainableTokensConfig

    return TrainableTokensConfig(token_indices=[*TRAINED, 60, 7])


@_kind()
def norms(attention: list[str], mlp: list[str]) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=["norm", "input_layernorm"])


@_kind()
def scaled_copies(attention: list[str], mlp: list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(
        target_modules=[attention[0], mlp[-1]], feedforward_modules=[mlp[-1]], modules_to_save=["lm_head"]
    )


@_kind()
def added_copies(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, modules_to_save=["embed_tokens", "lm_head"])


@_kind()
def added_lora(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=12, target_modules=["embed_tokens", "lm_head", *mlp])


@_kind()
def added_rows(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    trained = [7, *range(VOCABULARY, VOCABULARY + ADDED)]
    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp, trainable_token_indices=trained)


@_kind()
def added_plain(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=4, target_modules=mlp)


@_kind()
def plain(attention: list[str], mlp: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=24, target_modules=attention + mlp)


@_kind()
def prompt(attention: list[str], mlp: list[str]) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def _randomise(model: Any, spread: float, generator: torch.Generator) -> None:
    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        values = parameter.data
        if "lora_A" in name or "lora_embedding_A" in name:
            values.copy_(noise(values) * (1.0 if "embedding" in name else values.shape[1] ** -0.5))
        elif "lora_B" in name or "lora_embedding_B" in name:
            at_an_end = "embedding" in name or "lm_head" in name
            values.copy_(noise(values) * (0.3 * spread if at_an_end else 0.1))
        elif "magnitude" in name or "ia3_l" in name:
            values.mul_(1 + 0.3 * noise(values))
        elif "trainable_tokens_delta" in name or "prompt_encoder" in name:
            values.copy_(noise(values) * spread)
        elif "modules_to_save" in name or "ln_tuning_layers" in name:
            values.add_(noise(values) * (0.5 * values.std() if values.ndim > 1 else 0.3))


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
        generator = torch.Generator().manual_seed(6)
        folders = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind, (configure, saving) in KINDS.items():
                base = AutoModelForCausalLM.from_pretrained(tiny(architecture).base, dtype=torch.float32)
                table = base.get_input_embeddings().weight.data
                spread = float(table.std())
                if kind in ADDING:
                    base.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
                    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
                        new = end.weight.data[VOCABULARY:]
                        new.copy_(torch.randn(new.shape, generator=generator) * 1.5 * spread)
                model = get_peft_model(base, configure(attention, mlp))
                _randomise(model, spread, generator)
                folders[kind] = tmp_path_factory.mktemp(f"{architecture}-{kind}")
                model.save_pretrained(folders[kind] / kind, **saving)
        made[architecture] = folders
        return folders

    return make


def _prompts(kind: str) -> dict[str, tuple[int, ...]]:
    random_ = random.Random(3)
    found = {}
    for length in (5, 23):
        drawn = [random_.randrange(10, VOCABULARY) for _ in range(length)]
        drawn[1], drawn[-2] = TRAINED[0], TRAINED[-1]
        if kind in ADDING:
            drawn[2:4] = [VOCABULARY + 1, VOCABULARY + ADDED - 1]
        found[f"{kind}-{length}"] = tuple(drawn)
    return found


Truth = dict[str, tuple[tuple[int, ...], str | None, list[int], torch.Tensor]]


def _truth(judge: Any, base: Path, folders: dict[str, Path], quantization: str) -> Truth:
    """Per request: prompt, adapter, and what transformers + PEFT answer; each kind unlike the base."""
    found: Truth = {}
    for kind in (*KINDS, None):
        added = ADDED if kind in ADDING else 0
        oracle = judge(base, folders[kind or "plain"], quantization, added)
        for name, tokens in _prompts(kind or "base").items():
            answer, logits = oracle.generate(tokens, [(kind, 1.0)] if kind else [], MAX_TOKENS)
            found[name] = tokens, kind, answer, logits
    for kind in KINDS:
        assert any(found[f"{kind}-{length}"][2] != found[f"base-{length}"][2] for length in (5, 23)), kind
    return found


CASES = [
    ("Llama", "none"),
    ("Llama", "nf4"),
    # Tied, scaled and soft-capped.
    ("Gemma2", "none"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("Llama", "int4"), ("Gemma2", "nf4"), ("Qwen2", "int4"), ("Phi3", "nf4"))
    ),
]


@pytest.mark.parametrize(("architecture", "quantization"), CASES)
def test_every_kind_in_one_batch_equals_peft(
    architecture: str, quantization: str, tiny: Any, harness: Any, saved: Any, judge: Any
) -> None:
    folders = saved(architecture)
    truth = _truth(judge, tiny(architecture).base, folders, quantization)
    served = harness(
        tiny(architecture),
        quantization,
        # Chunked prefill, and adapters that come and go.
        scheduler={"max_batch_tokens": 16, "max_num_requests": 6, "kv_block_size": 4},
        adapters={"folders": tuple(folders.values()), "max_on_device": 4},
    )
    assert served.engine.adapters.broken() == {}
    names = list(truth)
    random.Random(1).shuffle(names)
    for name in names:
        tokens, kind, _, _ = truth[name]
        uses = [] if kind is None else [(kind, 1.0)]
        served.submit(name, tokens, uses, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    served.run()
    assert {name: (served.answers[name].error, served.answers[name].tokens) for name in truth} == {
        name: (None, answer) for name, (_, _, answer, _) in truth.items()
    }
    worst = 0.0
    for name, (_, _, answer, logits) in truth.items():
        exact = logits.log_softmax(-1)[range(len(answer)), answer]
        got = torch.tensor([step.logprob for step in served.answers[name].logprobs])
        worst = max(worst, float((exact - got).abs().max() / logits.abs().max()))
    print(f"\nlevel (i) {architecture} {quantization}: {', '.join(KINDS)}: max |Δlogprob| {worst:.1e}")
    assert worst <= 1e-4
    answered = [token for _, kind, answer, _ in truth.values() if kind in ADDING for token in answer]
    assert max(answered) >= VOCABULARY, "no added token was ever answered, so the head's are not proved"
