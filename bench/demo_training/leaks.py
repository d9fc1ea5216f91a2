"""A check that the demo's answers give a leak away even if it touches only half of a request.

A server could apply the wrong adapter to the prompt alone or to the decoded tokens alone, while the other
half is right. The base is trained to change a line only where both halves carry the same adapter; here PEFT
plays such a server, so that one can see how often the answer would still pass for the right one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from loraplex_bench.demo.tasks import draw_line, expected, prompt


@torch.inference_mode()
def split_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt_adapter: str | None,
    decode_adapter: str | None,
    lines: Sequence[str],
) -> list[str]:
    """Greedy answers, as long as the lines: one adapter over the prompt, another over the decoded tokens.

    `lines` have one length; None stands for the base.
    """
    ids = tokenizer([prompt(line) for line in lines], return_tensors="pt")["input_ids"]
    with _active(model, prompt_adapter):
        out = model(input_ids=ids, use_cache=True)
    tokens = [out.logits[:, -1:].argmax(-1)]
    with _active(model, decode_adapter):
        for _ in range(len(lines[0]) - 1):
            out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1:].argmax(-1))
    return [tokenizer.decode(row) for row in torch.cat(tokens, 1).tolist()]


def unnoticed_leaks(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    others: Sequence[str | None],
    num_lines: int,
) -> dict[str, float]:
    """The share of requests of `name` answered rightly although half of each ran under one of `others`.

    Returns the fraction for the wrong adapter over the `prompt` and over the `decode`.
    """
    rng = random.Random(f"leaks/{name}")
    right = {"prompt": 0, "decode": 0}
    for other in others:
        lines = [draw_line(rng, 18) for _ in range(num_lines)]
        wanted = [expected(name, line) for line in lines]
        by_prompt = split_answers(model, tokenizer, other, name, lines)
        by_decode = split_answers(model, tokenizer, name, other, lines)
        right["prompt"] += sum(a == b for a, b in zip(by_prompt, wanted, strict=True))
        right["decode"] += sum(a == b for a, b in zip(by_decode, wanted, strict=True))
    return {half: round(count / (num_lines * len(others)), 4) for half, count in right.items()}


def _active(model: PeftModel, name: str | None) -> AbstractContextManager[None]:
    if name is None:
        context: AbstractContextManager[None] = model.disable_adapter()
        return context
    model.set_adapter(name)
    return nullcontext()
