"""From a schedule to a step plan: which integers the runner gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from loraplex_server.adapters.record import AdapterHandle
from loraplex_server.core.random import uniform
from loraplex_server.core.step import StepPlan
from loraplex_server.engine.scheduler import Scheduled

SlotOf = Callable[[AdapterHandle], int]


def build_plan(
    scheduled: Sequence[Scheduled], block_size: int, slot_of: SlotOf, eos_token_ids: tuple[int, ...]
) -> StepPlan:
    """The plan that computes `scheduled`, in that order.

    Args:
        slot_of: device slot of an adapter that is on the device.
        eos_token_ids: masked, with the request's stop tokens, until `min_tokens` exist.
    """
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    lengths: list[int] = []
    contexts: list[int] = []
    tables: list[list[int]] = []
    runs: list[tuple[int, int, list[tuple[int, float]]]] = []
    sampled: list[Scheduled] = []
    sample_row: list[int] = []
    for item in scheduled:
        sequence, first = item.sequence, item.sequence.num_computed
        end = first + item.num_tokens
        row = len(token_ids)
        token_ids += sequence.token_ids[first:end]
        span = np.arange(first, end)
        positions.append(span)
        table = np.array(sequence.block_table, dtype=np.int64)
        slots.append(table[span // block_size] * block_size + span % block_size)
        lengths.append(item.num_tokens)
        contexts.append(end)
        tables.append(sequence.block_table[: -(-end // block_size)])
        runs += _runs(item, row, slot_of)
        if item.samples:
            sampled.append(item)
            sample_row.append(row + item.num_tokens - 1)
    banned = [_banned(item, eos_token_ids) for item in sampled]
    params = [item.sequence.request.sampling for item in sampled]
    return StepPlan(
        token_ids=_ints(token_ids),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        query_start=_starts(lengths),
        context_len=_ints(contexts),
        block_start=_starts([len(table) for table in tables]),
        blocks=_ints([block for table in tables for block in table]),
        run_start=_ints([start for start, _, _ in runs]),
        run_end=_ints([end for _, end, _ in runs]),
        run_pair_start=_starts([len(pairs) for _, _, pairs in runs]),
        pair_slot=_ints([slot for _, _, pairs in runs for slot, _ in pairs]),
        pair_weight=_floats([weight for _, _, pairs in runs for _, weight in pairs]),
        sample_row=_ints(sample_row),
        temperature=_floats([sampling.temperature for sampling in params]),
        top_k=_ints([sampling.top_k for sampling in params]),
        top_p=_floats([sampling.top_p for sampling in params]),
        uniform=_floats(
            [uniform(item.sequence.request.sampling.seed, len(item.sequence.token_ids)) for item in sampled]
        ),
        num_logprobs=_ints([-1 if sampling.logprobs is None else sampling.logprobs for sampling in params]),
        banned_start=_starts([len(ids) for ids in banned]),
        banned_ids=_ints([token for ids in banned for token in ids]),
    )


def _runs(item: Scheduled, row: int, slot_of: SlotOf) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """(first row, end, [(slot, weight), ...]) of each stretch of equal, non-empty composition."""
    sequence, first = item.sequence, item.sequence.num_computed
    if not sequence.handles:
        return []
    end = first + item.num_tokens
    changes = [position for position in sequence.adapter_changes if first < position < end]
    runs = []
    for start, stop in pairwise([first, *changes, end]):
        composition = sequence.adapters_at(start)
        if composition:
            slots = [(slot_of(handle), weight) for handle, weight in composition]
            runs.append((row + start - first, row + stop - first, slots))
    return runs


def _banned(item: Scheduled, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    sampling = item.sequence.request.sampling
    if item.sequence.num_generated >= sampling.min_tokens:
        return ()
    return tuple(dict.fromkeys((*eos_token_ids, *sampling.stop_token_ids)))


def _ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _floats(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _starts(lengths: list[int]) -> np.ndarray:
    return _ints([0, *accumulate(lengths)])
