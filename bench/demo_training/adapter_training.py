"""Trains the demo's adapters with PEFT on the nf4-dequantised base."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.batches import adapter_batch
from demo_training.quantization import quantize_
from loraplex_bench.demo.tasks import MAX_LINE_LENGTH, MIN_LINE_LENGTH

BASE_NAME = "loraplex-demo"
"""The base model's name in the adapters' configuration."""

_QV = ("q_proj", "v_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL_LINEAR = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSpec:
    """Shape of one adapter, as PEFT names it."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    use_rslora: bool = False


ADAPTERS: Mapping[str, AdapterSpec] = {
    "upper": AdapterSpec(4, 8, _QV),
    "snake": AdapterSpec(4, 4, _QV),
    "redact": AdapterSpec(4, 16, _QV, use_rslora=True),
    "vowelmask": AdapterSpec(6, 12, _QV),
    "vowelupper": AdapterSpec(6, 6, _ATTENTION),
    "leet": AdapterSpec(7, 14, _ATTENTION),
    "rot5": AdapterSpec(7, 7, _ATTENTION, use_rslora=True),
    "title": AdapterSpec(8, 16, _ATTENTION),
    "digitflip": AdapterSpec(8, 24, _ATTENTION),
    "hideconsonants": AdapterSpec(8, 8, _QV),
    "vowelshift": AdapterSpec(12, 24, _ATTENTION),
    "caesar1": AdapterSpec(12, 12, _ALL_LINEAR),
    "atbash": AdapterSpec(14, 28, _ALL_LINEAR),
    "rot13": AdapterSpec(16, 32, _ALL_LINEAR),
    "caesar3": AdapterSpec(16, 16, _ALL_LINEAR, use_rslora=True),
    "caesar25": AdapterSpec(32, 32, _ALL_LINEAR),
}
"""Shape by adapter name: low ranks for tasks on few characters, high ranks at all sites for permutations."""


@dataclass(frozen=True)
class AdapterRecipe:
    """Settings of each adapter's training."""

    seed: int = 21
    steps: int = 200
    rows: int = 64
    peak_learning_rate: float = 4e-3


def train_adapter(
    tokenizer: PreTrainedTokenizerFast, base_dir: Path, name: str, recipe: AdapterRecipe, target_dir: Path
) -> tuple[float, float]:
    """Trains the adapter `name` on the base in `base_dir`, saves it to `target_dir`.

    Returns the seconds taken and the last batch's loss.
    """
    torch.manual_seed(recipe.seed)
    spec = ADAPTERS[name]
    base = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    base.config._name_or_path = BASE_NAME
    quantize_(base, "nf4")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        use_rslora=spec.use_rslora,
        target_modules=list(spec.target_modules),
        base_model_name_or_path=BASE_NAME,
    )
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_learning_rate, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.monotonic()
    for step in range(1, recipe.steps + 1):
        rng = random.Random(f"{recipe.seed}/{name}/{step}")
        batch = adapter_batch(tokenizer, rng, name, recipe.rows, (MIN_LINE_LENGTH, MAX_LINE_LENGTH))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                input_ids=batch.inputs, use_cache=False, logits_to_keep=batch.targets.shape[1]
            ).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            exact = (logits.argmax(-1) == batch.targets).all(1).float().mean().item()
            seconds = time.monotonic() - started
            print(
                f"{name}: step {step}/{recipe.steps} {seconds:.0f} s "
                f"loss {loss.item():.4f} exact {exact:.2f}",
                flush=True,
            )
    _save(model, target_dir)
    return time.monotonic() - started, loss.item()


def _save(model: PeftModel, target_dir: Path) -> None:
    """Saves with PEFT, weights as bfloat16, and a configuration without paths of this machine."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    model.save_pretrained(target_dir, save_embedding_layers=False)
    (target_dir / "README.md").unlink(missing_ok=True)
    weights = target_dir / "adapter_model.safetensors"
    save_file(
        {key: value.to(torch.bfloat16) for key, value in load_file(weights).items()},
        weights,
        {"format": "pt"},
    )
    path = target_dir / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2) + "\n")
