"""Training batches of the demo model: seeded by step, so that a resumed run sees the same ones."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from loraplex_bench.demo.tasks import TASKS, draw_line, expected, prompt

TASK_IDS: dict[str | None, int] = {name: index for index, name in enumerate((None, *TASKS))}
"""Row of a task in the base's table of task vectors; row 0 stands for no task."""

_ANY_CHARACTER = string.ascii_letters + string.digits + string.punctuation + " "


@dataclass(frozen=True)
class Batch:
    """Sequences of one length: prompt, right answer, end of sequence.

    `ids` [rows, tokens] int64; `task_ids` [rows, tokens] int64, the task signalled to each token;
    `answer_start`: the token, the prompt's last one, from which the model predicts the answer.
    """

    ids: torch.Tensor
    task_ids: torch.Tensor
    answer_start: int

    @property
    def inputs(self) -> torch.Tensor:
        """The model's input, [rows, tokens - 1]."""
        return self.ids[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that it should say, [rows, answer characters + 1]."""
        return self.ids[:, self.answer_start + 1 :]


def encode(tokenizer: PreTrainedTokenizerFast, lines: Sequence[str], answers: Sequence[str]) -> Batch:
    """Lines of one length with their right answers, no task signalled."""
    texts = [prompt(line) + answer for line, answer in zip(lines, answers, strict=True)]
    ids = torch.tensor([[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]])
    return Batch(ids, torch.zeros_like(ids), len(lines[0]) + 1)


def adapter_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, task: str, rows: int, lengths: tuple[int, int]
) -> Batch:
    """Lines and right answers of one task, not signalled: the adapter has to bring the task about."""
    length = rng.randint(*lengths)
    lines = [draw_line(rng, length) for _ in range(rows)]
    return encode(tokenizer, lines, [expected(task, line) for line in lines])


def base_batch(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    rows: int,
    lengths: tuple[int, int],
    mismatched: float,
) -> Batch:
    """The base's mixture: copies without a signal, and tasks signalled to prompt and answer alike.

    In a fraction `mismatched` of the rows prompt and answer get different signals, or only one of them gets
    any, and the right answer is the copy. The base so learns to change a line only where both agree: an
    adapter applied to the prompt alone, or to the answer alone, gives itself away.
    """
    length = rng.randint(*lengths)
    lines, answers, signals = [], [], []
    for row in range(rows):
        line = draw_line(rng, length)
        if row % 2:
            task = rng.choice(list(TASKS))
            other = rng.choice([None, rng.choice(list(TASKS))])
            pair: tuple[str | None, str | None] = (task, other) if rng.random() < 0.5 else (other, task)
            pair = pair if rng.random() < 2 * mismatched else (task, task)
        else:
            pair = (None, None)
            if row % 16 == 0:
                line = "".join(rng.choices(_ANY_CHARACTER, k=length))
        lines.append(line)
        answers.append(expected(pair[0] if pair[0] == pair[1] else None, line))
        signals.append(pair)
    batch = encode(tokenizer, lines, answers)
    for row, (before, after) in enumerate(signals):
        batch.task_ids[row, : batch.answer_start] = TASK_IDS[before]
        batch.task_ids[row, batch.answer_start :] = TASK_IDS[after]
    return batch
