"""Picks the lines that the shipped model answers rightly with room to spare, whoever is asked.

The model errs on a few lines in ten thousand. A soak that allows no wrong answer at all asks about these
instead: there, a wrong answer is the server's fault, and machines that round differently still agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from demo_training.batches import encode
from demo_training.check import load_tokenizer, load_with_adapters
from demo_training.quantization import MODES
from loraplex_bench.demo.tasks import TASKS, expected, make_lines

MARGIN = 2.0
"""Least lead, in logits, of every token of a sure line's right answers over the next best token."""


@torch.inference_mode()
def margins(
    model: Any, tokenizer: PreTrainedTokenizerFast, name: str | None, lines: Sequence[str]
) -> dict[str, float]:
    """By line, the least lead of the right token over the best other one while the right answer is written.

    Positive exactly where the greedy answer is right. The adapter `name` must be active in `model`.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for line in lines:
        by_length[len(line)].append(line)
    result: dict[str, float] = {}
    for same in by_length.values():
        batch = encode(tokenizer, same, [expected(name, line) for line in same])
        targets = batch.targets[..., None]
        logits = model(input_ids=batch.inputs, use_cache=False, logits_to_keep=targets.shape[1]).logits
        lead = logits.gather(-1, targets)[..., 0] - logits.scatter(-1, targets, -torch.inf).amax(-1)
        result.update(zip(same, lead.amin(1).tolist(), strict=True))
    return result


def write_sure_lines(data: Path, seed: int, num_candidates: int) -> None:
    """Writes `lines.txt` into `data`: candidates with enough margin for base and adapters in all formats."""
    lines = list(dict.fromkeys(make_lines(seed, num_candidates)))
    tokenizer = load_tokenizer(data / "base")
    for mode in MODES:
        model = load_with_adapters(data / "base", data / "adapters", list(TASKS), mode)
        for name in (None, *TASKS):
            lead = _margins_of(model, tokenizer, name, lines)
            lines = [line for line in lines if lead[line] >= MARGIN]
        print(f"lines: {len(lines)} of {num_candidates} left after {mode}", flush=True)
    (data / "lines.txt").write_text("".join(f"{line}\n" for line in lines))


def _margins_of(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, name: str | None, lines: Sequence[str]
) -> dict[str, float]:
    if name is None:
        with model.disable_adapter():
            return margins(model, tokenizer, name, lines)
    model.set_adapter(name)
    return margins(model, tokenizer, name, lines)
