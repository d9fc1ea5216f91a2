"""Before a soak: which lines each adapter answers right when it is alone, and steps of every size."""

from __future__ import annotations

import asyncio
import random

from loraplex import ModelInfo
from loraplex_bench.demo.tasks import MAX_ANSWER_TOKENS, MAX_LINE_LENGTH, expected, prompt, sure_lines
from loraplex_bench.scenarios.checks import Check
from loraplex_bench.scenarios.soak.state import LINES_PER_ADAPTER, MIN_SCREENED, Soak


async def screen(soak: Soak) -> Check:
    """Asks each adapter about its lines, no other beside it, and keeps those it answers right.

    The lines are ones on which the model is sure; what it answers right alone it must answer right
    under load.
    """
    pool = sure_lines()
    asked = right = 0
    # The lines of adapters that are loaded at run time must be screened, too.
    others = {path.name: path for path in soak.spare if path.name not in soak.served}
    for number, task in enumerate((None, *soak.served, *others)):
        if task is not None and task in others:
            await soak.client.adapters.load(task, others[task])
        lines = random.Random(soak.config.seed * 1000 + number).sample(pool, LINES_PER_ADAPTER)
        answers = await asyncio.gather(
            *(
                soak.client.generate(prompt(line), adapter=task, max_tokens=MAX_ANSWER_TOKENS)
                for line in lines
            )
        )
        kept = []
        for line, answer in zip(lines, answers, strict=True):
            if answer.text == expected(task, line):
                kept.append(line)
            else:
                soak.faults.append(f"alone: {task or 'base'}: {line!r} -> {answer.text!r}")
        soak.lines[task] = kept
        asked += len(lines)
        right += len(kept)
        if task is not None and task in others:
            await soak.client.adapters.unload(task)
    passed = right >= MIN_SCREENED * asked and all(soak.lines.values())
    return Check("right when alone", passed, f"{right} of {asked} answers, before the soak")


async def warm_up(soak: Soak, model: ModelInfo) -> None:
    """Steps of every size there is: CPU libraries keep code and buffers for each number of rows they
    have met, which would look like a leak while the soak meets them one by one."""
    load = soak.config.concurrency * (MAX_LINE_LENGTH + 2)
    for tokens in range(1, min(load, model.max_batch_tokens, model.max_model_len - 1) + 1):
        await soak.client.generate([soak.config.seed] * tokens, max_tokens=1)
