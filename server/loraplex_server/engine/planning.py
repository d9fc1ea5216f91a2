"""From a schedule to a step plan: which integers the runner gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise

import numpy as np

from loraplex_server.adapters.residency.record import AdapterHandle
from loraplex_server.core.random import uniform
from loraplex_server.core.step import Ints, StepPlan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.engine.sequence import Sequence

SlotOf = Callable[[AdapterHandle], int]

Drafts = tuple[int, ...]
_Row = tuple[Sequence, Drafts]
"""A row after which a token is sampled: of a sequence, as if these guesses were its tokens."""


def build_plan(
    scheduled: Iterable[Scheduled], block_size: int, slot_of: SlotOf, eos_token_ids: tuple[int, ...]
) -> StepPlan:
    """The plan that computes `scheduled`, in that order.

    Args:
        slot_of: device slot of an adapter that is on the device.
        eos_token_ids: masked, with the request's stop tokens, until `min_tokens` exist.
    """
    token_ids: list[int] = []
    lengths: list[int] = []
    contexts: list[int] = []
    blocks: list[int] = []
    num_blocks: list[int] = []
    runs: list[tuple[int, int, list[tuple[int, float]]]] = []
    sampled: list[_Row] = []
    sample_row: list[int] = []
    prefixes: list[tuple[int, int, list[int]]] = []
    fed: list[tuple[int, int]] = []
    scored: list[tuple[int, int, int]] = []
    for item in scheduled:
        sequence, length = item.sequence, item.num_tokens
        first = sequence.num_computed
        known = first + length
        end = known + len(item.drafts)
        row = len(token_ids)
        if sequence.awaited is not None and known == len(sequence.token_ids):
            fed.append((row + length - 1, sequence.awaited))
        token_ids += sequence.token_ids[first:known]
        token_ids += item.drafts
        lengths.append(end - first)
        contexts.append(end)
        table = sequence.block_table[: -(-end // block_size)]
        blocks += table
        num_blocks.append(len(table))
        if sequence.handles:
            runs += _runs(item, row, slot_of)
        if item.num_copied:
            prefixes.append(_prefix(item, block_size, slot_of))
        if sequence.num_unscored:
            scored += _scored(item, row)
        if item.samples:
            sampled.append((sequence, ()))
            sample_row.append(row + length - 1)
            for count in range(1, len(item.drafts) + 1):
                sampled.append((sequence, item.drafts[:count]))
                sample_row.append(row + length - 1 + count)
    params = [sequence.request.sampling for sequence, _ in sampled]
    banned = [_banned(sequence, drafts, eos_token_ids) for sequence, drafts in sampled]
    masked = _masked(sampled, banned)
    query_start, block_start = _starts(lengths), _starts(num_blocks)
    context_len, block_ids = _ints(contexts), _ints(blocks)
    token_sequence = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(token_ids)) + (context_len - query_start[1:])[token_sequence]
    token_block = block_ids[block_start[token_sequence] + positions // block_size]
    return StepPlan(
        token_ids=_ints(token_ids),
        positions=positions,
        slot_mapping=token_block * block_size + positions % block_size,
        query_start=query_start,
        context_len=context_len,
        block_start=block_start,
        blocks=block_ids,
        run_start=_ints([start for start, _, _ in runs]),
        run_end=_ints([end for _, end, _ in runs]),
        run_pair_start=_starts([len(pairs) for _, _, pairs in runs]),
        pair_slot=_ints([slot for _, _, pairs in runs for slot, _ in pairs]),
        pair_weight=_floats([weight for _, _, pairs in runs for _, weight in pairs]),
        sample_row=_ints(sample_row),
        temperature=_floats([sampling.temperature for sampling in params]),
        top_k=_ints([sampling.top_k for sampling in params]),
        top_p=_floats([sampling.top_p for sampling in params]),
        uniform=_floats([_draw(sequence, drafts) for sequence, drafts in sampled]),
        num_logprobs=_ints([-1 if sampling.logprobs is None else sampling.logprobs for sampling in params]),
        banned_start=_starts([len(ids) for ids in banned]),
        banned_ids=_ints([token for ids in banned for token in ids]),
        fed_row=_ints([row for row, _ in fed]),
        fed_from=_ints([index for _, index in fed]),
        score_row=_ints([row for row, _, _ in scored]),
        score_id=_ints([token for _, token, _ in scored]),
        score_top=_ints([top for _, _, top in scored]),
        **_rare(sampled),
        **masked,
        prefix_slot=_ints([slot for slot, _, _ in prefixes]),
        prefix_first=_ints([first for _, first, _ in prefixes]),
        prefix_start=_starts([len(cells) for _, _, cells in prefixes]),
        prefix_cells=_ints([cell for _, _, cells in prefixes for cell in cells]),
    )


def _runs(item: Scheduled, row: int, slot_of: SlotOf) -> list[tuple[int, int, list[tuple[int, float]]]]:
    """(first row, end, [(slot, weight), ...]) of each stretch of equal, non-empty composition."""
    sequence, first = item.sequence, item.sequence.num_computed
    end = first + item.num_rows
    changes = [position for position in sequence.adapter_changes if first < position < end]
    runs = []
    for start, stop in pairwise([first, *changes, end]):
        composition = sequence.adapters_at(start)
        if composition:
            slots = [(slot_of(handle), weight) for handle, weight in composition]
            runs.append((row + start - first, row + stop - first, slots))
    return runs


def _scored(item: Scheduled, row: int) -> list[tuple[int, int, int]]:
    """(row, token that follows it, alternatives beside it) of each token of the prompt that is scored."""
    sequence = item.sequence
    top = sequence.request.sampling.prompt_logprobs
    assert top is not None
    first = row - sequence.num_computed
    return [(first + position, sequence.token_ids[position + 1], top) for position in item.scores]


def _prefix(item: Scheduled, block_size: int, slot_of: SlotOf) -> tuple[int, int, list[int]]:
    """(slot, first virtual token, cell of it and of each after it) of what is copied from an adapter."""
    sequence, end = item.sequence, item.sequence.num_computed
    ((handle, _),) = sequence.adapters_at(0)
    table, first = sequence.block_table, end - item.num_copied
    cells = [table[at // block_size] * block_size + at % block_size for at in range(first, end)]
    return slot_of(handle), first, cells


def _rare(sampled: list[_Row]) -> dict[str, np.ndarray]:
    """The sections of what few requests ask for; left out where none does."""
    params = [sequence.request.sampling for sequence, _ in sampled]
    sections: dict[str, np.ndarray] = {}
    if any(sampling.min_p for sampling in params):
        sections["min_p"] = _floats([sampling.min_p for sampling in params])
    if any(sampling.logit_bias for sampling in params):
        sections["bias_start"] = _starts([len(sampling.logit_bias) for sampling in params])
        sections["bias_ids"] = _ints([token for sampling in params for token, _ in sampling.logit_bias])
        sections["bias_value"] = _floats([value for sampling in params for _, value in sampling.logit_bias])
    if any(sampling.penalised for sampling in params):
        seen = [
            _seen(sequence, drafts) for sequence, drafts in sampled if sequence.request.sampling.penalised
        ]
        lengths = iter([len(ids) for ids, _ in seen])
        sections["seen_start"] = _starts([next(lengths) if sampling.penalised else 0 for sampling in params])
        sections["seen_ids"] = np.concatenate([ids for ids, _ in seen])
        sections["seen_count"] = np.concatenate([counts for _, counts in seen])
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            sections[name] = _floats([getattr(sampling, name) for sampling in params])
    return sections


def _masked(sampled: list[_Row], banned: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The sections of what grammars allow; left out where no row has one. Bans of their rows are in them."""
    rows, words = [], []
    for row, (sequence, _) in enumerate(sampled):
        if sequence.matcher is not None:
            rows.append(row)
            words.append(sequence.matcher.allowed(banned[row]))
            banned[row] = ()
    return {"masked_row": _ints(rows), "mask_words": np.concatenate(words)} if rows else {}


def _seen(sequence: Sequence, drafts: Drafts) -> tuple[Ints, Ints]:
    """The tokens that a row has, and the times that it generated them."""
    counts = sequence.token_counts
    found = counts.update(sequence.token_ids, sequence.num_prompt)
    return counts.with_more(drafts) if drafts else found


def _draw(sequence: Sequence, drafts: Drafts) -> float:
    """The draw of a row's next token; greedy decoding needs none."""
    sampling = sequence.request.sampling
    if not sampling.temperature > 0:
        return 0.0
    return uniform(sampling.seed, len(sequence.token_ids) + len(drafts))


def _banned(sequence: Sequence, drafts: Drafts, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    sampling = sequence.request.sampling
    banned = [word[-1] for word in sampling.bad_words if _ends_with(sequence.token_ids, drafts, word[:-1])]
    if sequence.num_generated + len(drafts) < sampling.min_tokens:
        banned += [*eos_token_ids, *sampling.stop_token_ids]
    elif sampling.ignore_eos and sequence.matcher is not None:
        # A grammar is over with it, so it is put off for as long as there is something else.
        banned += eos_token_ids
    return tuple(dict.fromkeys(banned))


def _ends_with(token_ids: list[int], drafts: Drafts, end: tuple[int, ...]) -> bool:
    return not end or (*token_ids[-len(end) :], *drafts)[-len(end) :] == end


def _ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _floats(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def _starts(lengths: list[int]) -> np.ndarray:
    return _ints([0, *accumulate(lengths)])
