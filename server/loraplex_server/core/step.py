"""One step, planned on the host: flat integers in one buffer that could be sent to other ranks as it is."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def _nothing() -> Ints:
    return np.zeros(0, np.int64)


def _no_floats() -> Floats:
    return np.zeros(0, np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """What the runner computes in one pass. Filled by `engine/planning.py`, read by `model/runner.py`.

    T tokens of B sequences stand in one ragged row. Example, with blocks of 4: sequence 0 decodes its
    sixth token, sequence 1 prefills three, and adapter slot 2 belongs to sequence 1::

        token_ids     [17, 5, 6, 7]     positions    [5, 0, 1, 2]
        query_start   [0, 1, 4]         context_len  [6, 3]
        block_start   [0, 2, 3]         blocks       [8, 3, 9]
        slot_mapping  [13, 36, 37, 38]
        run_start     [1]   run_end [4]   run_pair_start [0, 1]   pair_slot [2]   pair_weight [1.0]
        sample_row    [0, 3]
    """

    # Tokens, [T].
    token_ids: Ints
    """Negative for a virtual token: -1 - r is row r of the soft prompt of its run's adapter."""
    positions: Ints
    slot_mapping: Ints
    """Cell of the KV cache each token is written to: block * block_size + offset."""
    # Sequences: [B + 1], [B], [B + 1], [sum of the block tables' lengths].
    query_start: Ints
    context_len: Ints
    """Keys visible to the sequence's last token, this step's tokens included."""
    block_start: Ints
    blocks: Ints
    # Runs: contiguous tokens of one composition; tokens in no run have no adapter. [R], [R], [R + 1],
    # and the pairs (slot, weight) of all runs, [P].
    run_start: Ints
    run_end: Ints
    run_pair_start: Ints
    pair_slot: Ints
    pair_weight: Floats
    # Rows of the batch whose next token is sampled, [S] each.
    sample_row: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    uniform: Floats
    """The one draw of each token, in [0, 1): a function of seed and position alone. 0 for greedy rows."""
    num_logprobs: Ints
    """-1 for none, else how many alternatives beside the chosen token."""
    # Tokens that must not be sampled, [S + 1] and [sum].
    banned_start: Ints
    banned_ids: Ints
    # What few requests ask for; each group is empty where no row of the step does.
    min_p: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    # Added to logits: [S + 1], [sum], [sum]; no token twice in a row.
    bias_start: Ints = dataclasses.field(default_factory=_nothing)
    bias_ids: Ints = dataclasses.field(default_factory=_nothing)
    bias_value: Floats = dataclasses.field(default_factory=_no_floats)
    # Penalties: three columns [S], and the tokens that each row has with the times it generated them,
    # [S + 1], [sum], [sum]; rows without penalties have none.
    repetition_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    presence_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    frequency_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    seen_start: Ints = dataclasses.field(default_factory=_nothing)
    seen_ids: Ints = dataclasses.field(default_factory=_nothing)
    seen_count: Ints = dataclasses.field(default_factory=_nothing)
    # What grammars allow: rows (of those sampled) that have one, [G], and for each a bit for every token of
    # the base model, bit t % 64 of its word t // 64, [G * words]. Tokens without a bit are not allowed.
    masked_row: Ints = dataclasses.field(default_factory=_nothing)
    mask_words: Ints = dataclasses.field(default_factory=_nothing)
    # Prefixes: virtual tokens `prefix_first` and those after it of the adapter in a slot, copied before the
    # pass to cells of the KV cache. [C], [C], [C + 1], [sum]; few steps have any.
    prefix_slot: Ints = dataclasses.field(default_factory=_nothing)
    prefix_first: Ints = dataclasses.field(default_factory=_nothing)
    prefix_start: Ints = dataclasses.field(default_factory=_nothing)
    prefix_cells: Ints = dataclasses.field(default_factory=_nothing)
    # Rows of `token_ids` whose id was not known to the host: each is the token that the step launched before
    # this one sampled for its `sample_row[fed_from]`. [F] each.
    fed_row: Ints = dataclasses.field(default_factory=_nothing)
    fed_from: Ints = dataclasses.field(default_factory=_nothing)
    # Rows of the batch, each with the known token that follows it, whose log-probability is asked for, and
    # how many alternatives beside it. [Q] each.
    score_row: Ints = dataclasses.field(default_factory=_nothing)
    score_id: Ints = dataclasses.field(default_factory=_nothing)
    score_top: Ints = dataclasses.field(default_factory=_nothing)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    @property
    def logit_row(self) -> Ints:
        """Rows of the batch whose logits are wanted: those sampled, then those scored, [S + Q]."""
        return np.concatenate([self.sample_row, self.score_row]) if len(self.score_row) else self.sample_row

    @property
    def runs(self) -> list[tuple[int, int, tuple[tuple[int, float], ...]]]:
        """(first token, end, ((slot, weight), ...)) of each run, as the LoRA batch is built from."""
        pairs = list(zip(self.pair_slot.tolist(), self.pair_weight.tolist(), strict=True))
        bounds = pairwise(self.run_pair_start.tolist())
        spans = zip(self.run_start.tolist(), self.run_end.tolist(), bounds, strict=True)
        return [(start, end, tuple(pairs[first:last])) for start, end, (first, last) in spans]

    def to_bytes(self) -> bytes:
        """The plan in one buffer: the sections' lengths, then the sections, all 64-bit."""
        sections = [getattr(self, field.name) for field in dataclasses.fields(self)]
        lengths = np.array([len(section) for section in sections], dtype=np.int64)
        return b"".join(array.tobytes() for array in (lengths, *sections))

    @classmethod
    def from_bytes(cls, buffer: bytes) -> Self:
        """The plan that `to_bytes` wrote; its arrays are read-only views of `buffer`.

        Raises:
            ValueError: the buffer's size does not fit its header.
        """
        fields = dataclasses.fields(cls)
        words = np.frombuffer(buffer, dtype=np.int64)
        lengths, words = words[: len(fields)], words[len(fields) :]
        if len(lengths) < len(fields) or lengths.min() < 0 or lengths.sum() != len(words):
            raise ValueError(f"no step plan: {len(buffer)} bytes do not fit the header")
        sections = np.split(words, np.cumsum(lengths)[:-1])
        arrays: dict[str, Any] = {
            field.name: section.view(np.float64) if field.type == "Floats" else section
            for field, section in zip(fields, sections, strict=True)
        }
        return cls(**arrays)


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One sampled token. `logprob` is under the unmodified distribution; None unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What the runner gives back: one token for each of the plan's `sample_row`.

    Attributes:
        device_s: from the step's first kernel to its last result, by the device's clock; None without one.
        waited_s: how long the device had nothing to do since the step before; None without one.
        prepare_s: the host's time for the step's inputs and, where the device runs by itself, for launching.
        run_s: the forward pass; where the device runs by itself, `device_s`.
        sample_s: sampling; where the device runs by itself, the host's wait for the tokens.
        scored: the token of each of the plan's `score_row`, with its log-probability.
    """

    sampled: tuple[SampledToken, ...]
    device_s: float | None = None
    waited_s: float | None = None
    prepare_s: float | None = None
    run_s: float | None = None
    sample_s: float | None = None
    scored: tuple[SampledToken, ...] = ()
