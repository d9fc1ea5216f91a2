"""Named compositions through the engine: token for token what PEFT generates with its own combination."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_server.adapters.origins import composition_job
from loraplex_server.core.composition import Composition
from loraplex_server.core.request import AdapterUse

PROMPT = list(range(3, 30))
TOKENS = 20
WEIGHTS = {"first": 1.1, "second": 0.6}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"svd_rank": 8},
    "ties": {"density": 0.6, "majority_sign": "frequency"},
    "dare_ties": {"density": 0.6, "seed": 11},
    "dare_linear_svd": {"density": 0.6, "seed": 11},
    "magnitude_prune": {"density": 0.6},
}


@pytest.fixture
def pair(tiny: Callable[[str], Any], tmp_path: Path) -> tuple[Any, Path]:
    """The tiny Llama, and two adapters of one rank for it."""
    model = tiny("Llama")
    for seed, name in enumerate(WEIGHTS):
        shutil.copytree(model.adapters / "r6", tmp_path / "pair" / name)
        file = tmp_path / "pair" / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(tensor.shape, generator=generator) * tensor.std()
            for key, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return model, tmp_path / "pair"


@pytest.fixture
def ends(tiny: Callable[[str], Any], tmp_path: Path) -> tuple[Any, Path]:
    """Two adapters of the embedding and the head, saved with copies of the base's tables as PEFT does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny("Llama")
    generator = torch.Generator().manual_seed(7)
    for name in WEIGHTS:
        base = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"])
        peft = get_peft_model(base, config)
        for path, parameter in peft.named_parameters():
            if "lora_" in path:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        peft.save_pretrained(tmp_path / "ends" / name)
    return model, tmp_path / "ends"


def with_peft(base: Path, folder: Path) -> dict[str, list[int]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    first, *others = WEIGHTS
    peft = PeftModel.from_pretrained(model, folder / first, adapter_name=first)
    for name in others:
        peft.load_adapter(folder / name, adapter_name=name)
    answers = {}
    ids = torch.tensor([PROMPT])
    for kind, settings in COMPOSITIONS.items():
        chosen = {
            "density": settings.get("density"),
            "majority_sign_method": settings.get("majority_sign", "total"),
            "svd_rank": settings.get("svd_rank"),
        }
        torch.manual_seed(settings.get("seed", 0))
        peft.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), kind, combination_type=kind, **chosen
        )
        peft.set_adapter(kind)
        with torch.inference_mode():
            output = peft.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        answers[kind] = output[0, len(PROMPT) :].tolist()
    return answers


@pytest.mark.parametrize("adapters", ["pair", "ends"])
def test_answers_are_those_of_pefts_own_combination(
    adapters: str,
    request: pytest.FixtureRequest,
    harness: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, folder = request.getfixturevalue(adapters)
        expected = with_peft(model.base, folder)
        one = harness(model, adapters={"folders": (folder,), "cache_dir": tmp_path / "cache"})
        # What the process of its own runs, run here: the process is tested with the store.
        composer = one.engine.adapters.intake._composer
        monkeypatch.setattr(composer, "_run", lambda spec, unwanted: composition_job.combine(spec))
        uses = tuple(AdapterUse(*use) for use in WEIGHTS.items())
        outcomes: list[Any] = []
        for kind, settings in COMPOSITIONS.items():
            one.engine.adapters.intake.compose(kind, Composition(kind, uses, **settings), outcomes.append)
        while len(outcomes) < len(COMPOSITIONS):
            assert one.engine.adapters.wait_event(60)
            one.engine.adapters.poll()
    assert all(outcome.state == "host" for outcome in outcomes), outcomes
    answers = {
        kind: one.submit(kind, PROMPT, [(kind, 1.0)], max_tokens=TOKENS, ignore_eos=True)
        for kind in COMPOSITIONS
    }
    exact = one.submit("exact", PROMPT, list(WEIGHTS.items()), max_tokens=TOKENS, ignore_eos=True)
    one.run()
    assert {kind: answer.tokens for kind, answer in answers.items()} == expected
    assert answers["cat"].tokens == exact.tokens, "ranks side by side are the sum that a request may name"
    assert answers["linear"].tokens != exact.tokens, "and PEFT's linear is not"
    assert len({tuple(tokens) for tokens in expected.values()}) >= 5, "the ways differ"
