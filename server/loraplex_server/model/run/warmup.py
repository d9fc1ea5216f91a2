"""Warm-up steps that together use every kernel variant, so that no request waits for one to be compiled.

Variants depend on the numbers of rows, adapters and keys. The steps have powers of two of rows. Each is run
without adapters, with one adapter and more, up to the limit, and with several adapters per token. All steps
write to block 0 of the KV cache; slots without an adapter do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loraplex_server.core.step import StepPlan

# With this many keys, the attention of a few queries is split among kernel programs on every device.
_LONG_CONTEXT = 4096


def plans(
    max_tokens: int, max_context: int, num_slots: int, max_pairs_per_token: int, block_size: int
) -> Iterator[StepPlan]:
    """The plans of the warm-up steps.

    Args:
        max_tokens: most tokens of a step.
        max_context: tokens of the longest request.
        num_slots: adapter slots on the device.
        max_pairs_per_token: most adapters of one token.
        block_size: tokens per KV block.
    """
    powers = _doublings(max_tokens)
    for tokens in steps_up_to(max_tokens):
        yield _plan(tokens, tokens, 0, 1, num_slots, block_size)
        if tokens in powers or tokens == max_tokens:
            # A few tokens with several adapters make as many pairs as many tokens with one adapter.
            most = min(num_slots, max_pairs_per_token) if tokens == max_tokens else 1
            for several in _doublings(most):
                for runs in steps_up_to(min(tokens, num_slots)):
                    yield _plan(tokens, tokens, runs, several, num_slots, block_size)
    for tokens in (1, max_tokens):
        context = tokens + min(max_context, _LONG_CONTEXT)
        yield _plan(tokens, context, 0, 1, num_slots, block_size, sampled=True)


def _doublings(most: int) -> list[int]:
    """Powers of two up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())]


def steps_up_to(most: int) -> list[int]:
    """Powers of two up to `most`, the numbers half-way between them, and `most`."""
    powers = _doublings(most)
    return sorted({*powers, *(power * 3 // 2 for power in powers if power * 3 // 2 <= most), most})


def _plan(
    tokens: int,
    context: int,
    runs: int,
    several: int,
    num_slots: int,
    block_size: int,
    *,
    sampled: bool = False,
) -> StepPlan:
    """One sequence of `tokens` queries and `context` keys, in `runs` runs with `several` adapters each.

    Args:
        sampled: draw the token, with a log-probability and a banned token; otherwise sampling is greedy.
    """
    positions = np.arange(context - tokens, context)
    blocks = np.zeros(-(-context // block_size), np.int64)
    bounds = np.arange(runs + 1) * tokens // max(runs, 1)
    pairs = runs * several
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
        run_pair_start=np.arange(runs + 1) * several,
        pair_slot=np.arange(pairs) % num_slots,
        pair_weight=np.ones(pairs),
        sample_row=np.array([tokens - 1]),
        temperature=one if sampled else one - 1,
        top_k=np.array([0]),
        top_p=one,
        uniform=one / 2,
        num_logprobs=np.array([1 if sampled else -1]),
        banned_start=np.array([0, int(sampled)]),
        banned_ids=np.zeros(int(sampled), np.int64),
    )
