"""From a schedule to a step plan: gathers the batch row by row, then writes the plan's flat sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

from loraplex_server.adapters.residency.record import AdapterHandle
from loraplex_server.core.random import uniform
from loraplex_server.core.step import Ints, StepPlan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.engine.sequence import Sequence

SlotOf = Callable[[AdapterHandle], int]

Drafts = tuple[int, ...]

Sections = dict[str, np.ndarray]
"""Fields of a `StepPlan` by name."""


class _Run(NamedTuple):
    """Rows from `start` to `end` of one mix, which is not empty."""

    start: int
    end: int
    pairs: list[tuple[int, float]]


class _Sample(NamedTuple):
    """A row after which a token of a sequence is sampled, as if these drafts were its tokens."""

    row: int
    sequence: Sequence
    drafts: Drafts


class _Fed(NamedTuple):
    """A row whose token the step before samples, as this one of its samples."""

    row: int
    sample: int


class _Score(NamedTuple):
    """A row of a prompt, the token that follows it, and how many alternatives are wanted beside that."""

    row: int
    token_id: int
    top: int


class _Copied(NamedTuple):
    """Virtual tokens from `first` on of the prefix in a slot, copied to these cells of the KV cache."""

    slot: int
    first: int
    cells: list[int]


@dataclasses.dataclass
class _Batch:
    """The rows of a step; `lengths`, `contexts` and `tables` have an item for each sequence."""

    lengths: list[int] = dataclasses.field(default_factory=list)
    contexts: list[int] = dataclasses.field(default_factory=list)
    tables: list[list[int]] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    runs: list[_Run] = dataclasses.field(default_factory=list)
    samples: list[_Sample] = dataclasses.field(default_factory=list)
    fed: list[_Fed] = dataclasses.field(default_factory=list)
    scores: list[_Score] = dataclasses.field(default_factory=list)
    copied: list[_Copied] = dataclasses.field(default_factory=list)


def build_plan(
    scheduled: Iterable[Scheduled], block_size: int, slot_of: SlotOf, eos_token_ids: tuple[int, ...]
) -> StepPlan:
    """The plan that computes `scheduled`, in that order.

    Args:
        slot_of: device slot of an adapter that is on the device.
        eos_token_ids: masked, with the request's stop tokens, until `min_tokens` exist.
    """
    batch = _Batch()
    for item in scheduled:
        _add(batch, item, block_size, slot_of)
    return StepPlan(
        **_row_sections(batch, block_size),
        **_run_sections(batch.runs),
        **_sampling_sections(batch.samples, eos_token_ids),
        **_rare_sections(batch.samples),
        prefix_slot=_ints([copied.slot for copied in batch.copied]),
        prefix_first=_ints([copied.first for copied in batch.copied]),
        prefix_start=_starts([len(copied.cells) for copied in batch.copied]),
        prefix_cells=_ints([cell for copied in batch.copied for cell in copied.cells]),
        fed_row=_ints([fed.row for fed in batch.fed]),
        fed_from=_ints([fed.sample for fed in batch.fed]),
        score_row=_ints([score.row for score in batch.scores]),
        score_id=_ints([score.token_id for score in batch.scores]),
        score_top=_ints([score.top for score in batch.scores]),
    )


def _add(batch: _Batch, item: Scheduled, block_size: int, slot_of: SlotOf) -> None:
    """Adds the rows of one sequence."""
    sequence, first, row = item.sequence, item.sequence.num_computed, len(batch.token_ids)
    known = first + item.num_tokens
    end = known + len(item.drafts)
    batch.lengths.append(end - first)
    batch.contexts.append(end)
    batch.tables.append(sequence.block_table[: -(-end // block_size)])
    batch.token_ids += sequence.token_ids[first:known]
    batch.token_ids += item.drafts
    last = row + item.num_tokens - 1
    if sequence.awaited is not None and known == len(sequence.token_ids):
        batch.fed.append(_Fed(last, sequence.awaited))
    if sequence.handles:
        batch.runs += _runs(item, row, slot_of)
    if item.num_copied:
        batch.copied.append(_copied(item, block_size, slot_of))
    if sequence.num_unscored:
        batch.scores += _scores(item, row)
    if item.samples:
        batch.samples += [
            _Sample(last + count, sequence, item.drafts[:count]) for count in range(len(item.drafts) + 1)
        ]


def _runs(item: Scheduled, row: int, slot_of: SlotOf) -> list[_Run]:
    """Each stretch of one mix among the rows from `row` on; those without adapters are left out."""
    sequence, first = item.sequence, item.sequence.num_computed
    end = first + item.num_rows
    changes = [position for position in sequence.adapter_changes if first < position < end]
    runs = []
    for start, stop in pairwise([first, *changes, end]):
        mix = sequence.adapters_at(start)
        if mix:
            pairs = [(slot_of(handle), weight) for handle, weight in mix]
            runs.append(_Run(row + start - first, row + stop - first, pairs))
    return runs


def _scores(item: Scheduled, row: int) -> list[_Score]:
    """Each token of the prompt that is scored."""
    sequence = item.sequence
    top = sequence.request.sampling.prompt_logprobs
    assert top is not None
    first = row - sequence.num_computed
    return [_Score(first + position, sequence.token_ids[position + 1], top) for position in item.scores]


def _copied(item: Scheduled, block_size: int, slot_of: SlotOf) -> _Copied:
    """The part of an adapter's prefix that is copied before the step."""
    sequence, end = item.sequence, item.sequence.num_computed
    ((handle, _),) = sequence.adapters_at(0)
    table, first = sequence.block_table, end - item.num_copied
    cells = [table[at // block_size] * block_size + at % block_size for at in range(first, end)]
    return _Copied(slot_of(handle), first, cells)


def _row_sections(batch: _Batch, block_size: int) -> Sections:
    """Tokens, and the sequences that they belong to."""
    query_start, block_start = _starts(batch.lengths), _starts([len(table) for table in batch.tables])
    context_len, blocks = _ints(batch.contexts), _ints(list(chain.from_iterable(batch.tables)))
    token_sequence = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    positions = np.arange(len(batch.token_ids)) + (context_len - query_start[1:])[token_sequence]
    token_block = blocks[block_start[token_sequence] + positions // block_size]
    return {
        "token_ids": _ints(batch.token_ids),
        "positions": positions,
        "slot_mapping": token_block * block_size + positions % block_size,
        "query_start": query_start,
        "context_len": context_len,
        "block_start": block_start,
        "blocks": blocks,
    }


def _run_sections(runs: list[_Run]) -> Sections:
    pairs = [pair for run in runs for pair in run.pairs]
    return {
        "run_start": _ints([run.start for run in runs]),
        "run_end": _ints([run.end for run in runs]),
        "run_pair_start": _starts([len(run.pairs) for run in runs]),
        "pair_slot": _ints([slot for slot, _ in pairs]),
        "pair_weight": _floats([weight for _, weight in pairs]),
    }


def _sampling_sections(samples: list[_Sample], eos_token_ids: tuple[int, ...]) -> Sections:
    """Sampling parameters of each row, and tokens that are banned there."""
    params = [sample.sequence.request.sampling for sample in samples]
    banned = [_banned(sample, eos_token_ids) for sample in samples]
    masked = _mask_sections(samples, banned)
    return {
        "sample_row": _ints([sample.row for sample in samples]),
        "temperature": _floats([sampling.temperature for sampling in params]),
        "top_k": _ints([sampling.top_k for sampling in params]),
        "top_p": _floats([sampling.top_p for sampling in params]),
        "uniform": _floats([_draw(sample) for sample in samples]),
        "num_logprobs": _ints([-1 if one.logprobs is None else one.logprobs for one in params]),
        "banned_start": _starts([len(ids) for ids in banned]),
        "banned_ids": _ints([token for ids in banned for token in ids]),
        **masked,
    }


def _mask_sections(samples: list[_Sample], banned: list[tuple[int, ...]]) -> Sections:
    """Masks of grammars, none where no row has one. Takes the bans of their rows out of `banned`."""
    rows, words = [], []
    for index, sample in enumerate(samples):
        if sample.sequence.matcher is not None:
            rows.append(index)
            words.append(sample.sequence.matcher.allowed(banned[index]))
            banned[index] = ()
    return {"masked_row": _ints(rows), "mask_words": np.concatenate(words)} if rows else {}


def _rare_sections(samples: list[_Sample]) -> Sections:
    """Sections that few requests ask for; left out where none does."""
    params = [sample.sequence.request.sampling for sample in samples]
    sections: Sections = {}
    if any(sampling.min_p for sampling in params):
        sections["min_p"] = _floats([sampling.min_p for sampling in params])
    if any(sampling.logit_bias for sampling in params):
        sections["bias_start"] = _starts([len(sampling.logit_bias) for sampling in params])
        sections["bias_ids"] = _ints([token for sampling in params for token, _ in sampling.logit_bias])
        sections["bias_value"] = _floats([value for sampling in params for _, value in sampling.logit_bias])
    if any(sampling.penalised for sampling in params):
        sections |= _penalty_sections(samples)
    return sections


def _penalty_sections(samples: list[_Sample]) -> Sections:
    """Penalties of every row, and the tokens that rows with penalties have."""
    params = [sample.sequence.request.sampling for sample in samples]
    seen = [_seen(sample) for sample in samples if sample.sequence.request.sampling.penalised]
    lengths = iter([len(ids) for ids, _ in seen])
    sections = {
        "seen_start": _starts([next(lengths) if sampling.penalised else 0 for sampling in params]),
        "seen_ids": np.concatenate([ids for ids, _ in seen]),
        "seen_count": np.concatenate([counts for _, counts in seen]),
    }
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        sections[name] = _floats([getattr(sampling, name) for sampling in params])
    return sections


def _seen(sample: _Sample) -> tuple[Ints, Ints]:
    """The tokens that a row has, and how often it generated each."""
    sequence = sample.sequence
    counts = sequence.token_counts
    found = counts.update(sequence.token_ids, sequence.num_prompt)
    return counts.with_more(sample.drafts) if sample.drafts else found


def _draw(sample: _Sample) -> float:
    """The draw of a row's next token; greedy decoding needs none."""
    sampling = sample.sequence.request.sampling
    if not sampling.temperature > 0:
        return 0.0
    return uniform(sampling.seed, len(sample.sequence.token_ids) + len(sample.drafts))


def _banned(sample: _Sample, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that may not come next, each once."""
    _, sequence, drafts = sample
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
