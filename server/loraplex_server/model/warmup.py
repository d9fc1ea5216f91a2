"""Steps that between them take every kernel variant that a request could meet, so that none waits for one.

Variants are chosen by numbers of rows, of adapters and of keys: the steps go through powers of two of the
first, each without adapters, with one for all tokens, and with as many as there can be. All that they write
goes to block 0, and slots that hold no adapter do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loraplex_server.core.step import StepPlan

# Keys with which the attention of a few queries is divided among programs, on any device.
_LONG_CONTEXT = 4096


def plans(max_tokens: int, max_context: int, num_slots: int, block_size: int) -> Iterator[StepPlan]:
    """The steps, for a server of at most so many tokens a step, tokens a request and adapters."""
    for tokens in row_counts(max_tokens):
        for adapters in dict.fromkeys((0, 1, min(tokens, num_slots))):
            yield _plan(tokens, tokens, adapters, block_size)
    for tokens in (1, max_tokens):
        yield _plan(tokens, tokens + min(max_context, _LONG_CONTEXT), 0, block_size, sampled=True)


def row_counts(most: int) -> list[int]:
    """Powers of two up to `most`, the numbers half-way between them, and `most`."""
    powers = [1 << exponent for exponent in range(most.bit_length())]
    return sorted({*powers, *(power * 3 // 2 for power in powers if power * 3 // 2 <= most), most})


def _plan(tokens: int, context: int, adapters: int, block_size: int, *, sampled: bool = False) -> StepPlan:
    """One sequence of `tokens` queries and `context` keys, `adapters` of them side by side in its tokens.

    With `sampled` its token is drawn, among others, with log-probabilities and a ban; else it is the best.
    """
    positions = np.arange(context - tokens, context)
    blocks = np.zeros(-(-context // block_size), np.int64)
    bounds = np.arange(adapters + 1) * tokens // max(adapters, 1)
    one = np.ones(1)
    return StepPlan(
        token_ids=np.zeros(tokens, np.int64),
        positions=positions,
        slot_mapping=positions % block_size,
        query_start=np.array([0, tokens]),
        context_len=np.array([context]),
        block_start=np.array([0, len(blocks)]),
        blocks=blocks,
        run_start=bounds[:-1],
        run_end=bounds[1:],
        run_pair_start=np.arange(adapters + 1),
        pair_slot=np.arange(adapters),
        pair_weight=np.ones(adapters),
        sample_row=np.array([tokens - 1]),
        temperature=one if sampled else one - 1,
        top_k=np.array([0]),
        top_p=one,
        uniform=one / 2,
        num_logprobs=np.array([1 if sampled else -1]),
        banned_start=np.array([0, int(sampled)]),
        banned_ids=np.zeros(int(sampled), np.int64),
    )
