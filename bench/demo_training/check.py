"""Checks the demo model: its greedy answers when transformers and PEFT run it on dequantised weights."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.quantization import MODES, Mode, quantize_
from loraplex_bench.demo.tasks import (
    CHECK_SEED,
    MAX_ANSWER_TOKENS,
    TASKS,
    data_dir,
    expected,
    make_lines,
    prompt,
)


def load_base(base_dir: Path, mode: Mode) -> LlamaForCausalLM:
    """The base with float32 weights as `mode` would serve them, ready for inference."""
    model = LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    quantize_(model, mode)
    return model.eval()


def load_tokenizer(base_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved beside the base."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def load_with_adapters(base_dir: Path, adapters_dir: Path, names: Sequence[str], mode: Mode) -> PeftModel:
    """The base with the adapters `names` attached, one active at a time by `set_adapter`."""
    base = load_base(base_dir, mode)
    model = PeftModel.from_pretrained(base, adapters_dir / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters_dir / name, adapter_name=name)
    return model.eval()


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: PreTrainedTokenizerFast, lines: Sequence[str]) -> list[str]:
    """The greedy answer to each line; one that does not end within the longest answer's length says so."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, line in enumerate(lines):
        by_length[len(line)].append(index)
    answers = [""] * len(lines)
    for indices in by_length.values():
        inputs = tokenizer([prompt(lines[index]) for index in indices], return_tensors="pt")
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
        )
        for index, row in zip(indices, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            end = row.index(tokenizer.eos_token_id) if ended else len(row)
            answers[index] = tokenizer.decode(row[:end]) + ("" if ended else " (never ended)")
    return answers


def wrong_answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, name: str | None, lines: Sequence[str]
) -> list[tuple[str, str]]:
    """(line, answer) of every wrong greedy answer of the adapter `name`, or of the base if it is None."""
    if name is None and isinstance(model, PeftModel):
        with model.disable_adapter():
            answers = greedy_answers(model, tokenizer, lines)
    else:
        if name is not None:
            model.set_adapter(name)
        answers = greedy_answers(model, tokenizer, lines)
    return [
        (line, answer) for line, answer in zip(lines, answers, strict=True) if answer != expected(name, line)
    ]


def accuracies(
    base_dir: Path, adapters_dir: Path, names: Sequence[str], modes: Iterable[Mode], lines: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Fraction of exact answers by adapter (`base` for none) and weight format."""
    tokenizer = load_tokenizer(base_dir)
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for mode in modes:
        model = load_with_adapters(base_dir, adapters_dir, names, mode)
        for name in (None, *names):
            wrong = wrong_answers(model, tokenizer, name, lines)
            result[name or "base"][mode] = 1 - len(wrong) / len(lines)
            note = f"  e.g. {wrong[0][0]!r} -> {wrong[0][1]!r}" if wrong else ""
            print(f"{mode:5} {name or 'base':15} {len(lines) - len(wrong)}/{len(lines)}{note}", flush=True)
    return dict(result)


def main() -> None:
    """Command line: prints exact answers by format and adapter, exits with 1 if one falls short."""
    parser = argparse.ArgumentParser(prog="python -m demo_training.check", description=__doc__)
    parser.add_argument("adapters", nargs="*", help="adapters to check (default: all of them)")
    parser.add_argument(
        "--quantization", choices=MODES, action="append", help="weight format; repeatable (default: all)"
    )
    parser.add_argument(
        "--lines", type=int, default=500, help="lines per adapter and format (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=CHECK_SEED, help="seed of the lines (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=data_dir(), help="folder of base/ and adapters/ (default: shipped)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--at-least", type=float, default=0.99, help="lowest accepted accuracy (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    unknown = [name for name in args.adapters if name not in TASKS]
    if unknown:
        parser.error(f"adapters: {', '.join(unknown)} not among {', '.join(TASKS)}")
    result = accuracies(
        args.data / "base",
        args.data / "adapters",
        args.adapters or list(TASKS),
        args.quantization or MODES,
        make_lines(args.seed, args.lines),
    )
    worst = min(accuracy for by_mode in result.values() for accuracy in by_mode.values())
    print(f"lowest {worst:.4f}")
    raise SystemExit(worst < args.at_least)


if __name__ == "__main__":
    main()
