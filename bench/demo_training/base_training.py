"""Trains the demo's base: it copies its line, and holds the features its adapters steer."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.batches import TASK_IDS, Batch, base_batch
from demo_training.model import build_config
from demo_training.quantization import MODES, quantization_noise
from loraplex_bench.demo.tasks import MAX_LINE_LENGTH, MIN_LINE_LENGTH


@dataclass(frozen=True)
class BaseRecipe:
    """Settings of the base's training; fractions are of `steps`."""

    seed: int = 20
    steps: int = 4200
    rows: int = 64
    peak_learning_rate: float = 1.5e-3
    short_length: int = 12
    grow_from: float = 0.15
    grow_until: float = 0.35
    noise_from: float = 0.6
    mismatched: float = 0.12
    checkpoint_every: int = 250

    def lengths(self, step: int) -> tuple[int, int]:
        """Shortest and longest line at `step`: short ones first, since copying is found sooner on them."""
        progress = (step / self.steps - self.grow_from) / (self.grow_until - self.grow_from)
        grown = round((MAX_LINE_LENGTH - self.short_length) * min(max(progress, 0.0), 1.0))
        return MIN_LINE_LENGTH, self.short_length + grown


class _Student(nn.Module):
    """The base and its table of task vectors, which is dropped after training."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.base = LlamaForCausalLM(build_config(tokenizer))
        self.task_vectors = nn.Embedding(len(TASK_IDS), self.base.config.hidden_size, padding_idx=0)
        nn.init.normal_(self.task_vectors.weight, std=self.base.config.initializer_range)
        self.task_vectors.weight.data[0] = 0

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the answer's tokens, [rows, answer characters + 1, vocabulary], float32."""
        embeddings = self.base.model.embed_tokens(batch.inputs) + self.task_vectors(batch.task_ids[:, :-1])
        hidden = self.base.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.base.lm_head(hidden[:, batch.answer_start :])
        return logits.float()


@dataclass(frozen=True)
class TrainedBase:
    """The base with bfloat16 weights, the seconds its training took, and points of its progress by step."""

    model: LlamaForCausalLM
    seconds: float
    progress: dict[int, dict[str, float]]


def train_base(tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe, checkpoint: Path) -> TrainedBase:
    """Trains on from `checkpoint` if it is there, else from the seed, and leaves checkpoints there."""
    torch.manual_seed(recipe.seed)
    student = _Student(tokenizer)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=recipe.peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_learning_rate, total_steps=recipe.steps, pct_start=0.15, cycle_momentum=False
    )
    step, seconds = 0, 0.0
    progress: dict[int, dict[str, float]] = {}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, seconds = state["step"], state["seconds"]
        progress = state["progress"]
        print(f"base: resumed at step {step}", flush=True)
    started = time.monotonic() - seconds
    while step < recipe.steps:
        rng = random.Random(f"{recipe.seed}/base/{step}")
        batch = base_batch(tokenizer, rng, recipe.rows, recipe.lengths(step), recipe.mismatched)
        mode = rng.choice(MODES) if step >= recipe.noise_from * recipe.steps else "none"
        with quantization_noise(student.base, mode):
            with torch.autocast("cpu", torch.bfloat16):
                logits = student.logits(batch)
            loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        seconds = time.monotonic() - started
        if step % 50 == 0:
            summary = _summary(logits, batch)
            print(f"base: step {step}/{recipe.steps} {seconds:.0f} s {mode} {summary}", flush=True)
            if step % 250 == 0:
                progress[step] = summary
        if step % recipe.checkpoint_every == 0 or step == recipe.steps:
            _save(
                checkpoint,
                student=student.state_dict(),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                step=step,
                seconds=seconds,
                progress=progress,
            )
    return TrainedBase(student.base.to(torch.bfloat16), seconds, progress)


@torch.no_grad()
def _summary(logits: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Loss, and the exact fraction of rows without a signal, with one, and with two that disagree."""
    exact = (logits.argmax(-1) == batch.targets).all(1)
    before, after = batch.task_ids[:, 0], batch.task_ids[:, -1]
    rows = {
        "copy": (before == 0) & (after == 0),
        "task": (before == after) & (after > 0),
        "mismatch": before != after,
    }
    loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    parts = {name: exact[mask].float().mean().item() for name, mask in rows.items() if mask.any()}
    return {name: round(value, 4) for name, value in {"loss": loss, **parts}.items()}


def _save(path: Path, **state: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
