"""Jobs of the side-by-side bench's contenders, and their answers, as plain data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

MAX_BATCH_TOKENS = 2048
"""Tokens of one step of loraplex: all prompts at once, as PEFT's padded batch takes them."""

PEFT_WEIGHTS = ("dense", "bnb-nf4")
"""Weights that transformers + PEFT runs on: fp32 as they are, or NF4 by bitsandbytes."""


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A base model, its adapters (folders under `adapters`, by name), and what to call it in tables."""

    label: str
    base: Path
    adapters: Path
    names: tuple[str, ...]
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One request: token ids to continue, by an adapter or (None) by the base."""

    prompt: tuple[int, ...]
    adapter: str | None


@dataclasses.dataclass(frozen=True)
class Answered:
    """One pass over all jobs: wall seconds from the first to the last token, and each job's tokens."""

    seconds: float
    token_ids: list[list[int]]
