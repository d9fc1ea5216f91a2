"""One step of the model: the host's plan (`StepPlan`) and its result (`StepOutput`)."""

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
    """One pass of the runner, as flat arrays; `to_bytes` packs them into one buffer for other processes.

    `engine/planning.py` fills every field from the schedule; `model/run/runner.py` only reads them. Fields of
    rarely used features are empty in a step that does not need them.

    Shapes: T tokens of B sequences form one ragged row. R runs are contiguous tokens of one mix, with P
    (slot, weight) pairs in all; tokens in no run have no adapter. S tokens are sampled. A field `x_start`
    holds the offset at which each part of `x` begins, and the end of the last.

    Example, with blocks of 4: sequence 0 decodes its sixth token, sequence 1 prefills three, and adapter slot 2 belongs to sequence 1::

        token_ids     [17, 5, 6, 7]     positions    [5, 0, 1, 2]
        query_start   [0, 1, 4]         context_len  [6, 3]
        block_start   [0, 2, 3]         blocks       [8, 3, 9]
        slot_mapping  [13, 36, 37, 38]
        run_start     [1]   run_end [4]   run_pair_start [0, 1]   pair_slot [2]   pair_weight [1.0]
        sample_row    [0, 3]
    """

    # Tokens.
    token_ids: Ints
    """[T]; negative for a virtual token: -1 - r is row r of the soft prompt of its run's adapter."""
    positions: Ints
    """[T], within the token's sequence."""
    slot_mapping: Ints
    """[T]: cell of the KV cache that receives the token: block * block_size + offset."""

    # Sequences.
    query_start: Ints
    """[B + 1]: the sequence's first row."""
    context_len: Ints
    """[B]: keys visible to the sequence's last token, this step's tokens included."""
    block_start: Ints
    """[B + 1], into `blocks`."""
    blocks: Ints
    """[sum of the block tables' lengths]: the concatenated block tables."""

    # Runs of one mix.
    run_start: Ints
    """[R]: first row."""
    run_end: Ints
    """[R]: row after the last."""
    run_pair_start: Ints
    """[R + 1], into the pairs."""
    pair_slot: Ints
    """[P]: device slot of an adapter."""
    pair_weight: Floats
    """[P]: factor of the adapter's delta."""

    # Sampling.
    sample_row: Ints
    """[S]: the row after which a token is sampled."""
    temperature: Floats
    """[S]; 0 is greedy."""
    top_k: Ints
    """[S]; 0 keeps all tokens."""
    top_p: Floats
    """[S]"""
    uniform: Floats
    """[S]: the one draw of each token, in [0, 1), a function of seed and position; 0 for greedy rows."""
    num_logprobs: Ints
    """[S]: number of alternatives beside the chosen token; -1 for no log-probabilities at all."""
    banned_start: Ints
    """[S + 1], into `banned_ids`."""
    banned_ids: Ints
    """[sum]: tokens that must not be sampled."""

    # Sampling options that few requests use.
    min_p: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    bias_start: Ints = dataclasses.field(default_factory=_nothing)
    """[S + 1], into `bias_ids` and `bias_value`."""
    bias_ids: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: tokens with a bias; unique within a row."""
    bias_value: Floats = dataclasses.field(default_factory=_no_floats)
    """[sum]: value added to the token's logit."""
    repetition_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    presence_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    frequency_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    seen_start: Ints = dataclasses.field(default_factory=_nothing)
    """[S + 1], into `seen_ids` and `seen_count`; rows without penalties have none."""
    seen_ids: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: tokens of the prompt and of the answer so far; unique within a row."""
    seen_count: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: times the token occurs in the answer; 0 if only the prompt has it."""

    # Grammars: G of the sampled rows have a grammar.
    masked_row: Ints = dataclasses.field(default_factory=_nothing)
    """[G]: index into `sample_row`."""
    mask_words: Ints = dataclasses.field(default_factory=_nothing)
    """[G * words]: one bit for each token t of the base model, bit t % 64 of word t // 64; 1 is allowed."""

    # Prefixes: C copies of an adapter's keys and values to the KV cache, before the pass.
    prefix_slot: Ints = dataclasses.field(default_factory=_nothing)
    """[C]: device slot of the adapter."""
    prefix_first: Ints = dataclasses.field(default_factory=_nothing)
    """[C]: first virtual token to copy; the tokens after it follow."""
    prefix_start: Ints = dataclasses.field(default_factory=_nothing)
    """[C + 1], into `prefix_cells`."""
    prefix_cells: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: cell of the KV cache for each virtual token."""

    # F tokens that the host does not know yet.
    fed_row: Ints = dataclasses.field(default_factory=_nothing)
    """[F]: row with a placeholder in `token_ids`."""
    fed_from: Ints = dataclasses.field(default_factory=_nothing)
    """[F]: index into the `sample_row` of the step launched before this one, which samples the token."""

    # Scores: log-probabilities of Q prompt tokens.
    score_row: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: the row before the token."""
    score_id: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: the token."""
    score_top: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: number of alternatives beside the token."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    @property
    def logit_row(self) -> Ints:
        """[S + Q]: rows of the batch that need logits, first the sampled rows, then the scored ones."""
        return np.concatenate([self.sample_row, self.score_row]) if len(self.score_row) else self.sample_row

    @property
    def runs(self) -> list[tuple[int, int, tuple[tuple[int, float], ...]]]:
        """(first row, end, ((slot, weight), ...)) of each run: the input of `LoraBatch`."""
        pairs = list(zip(self.pair_slot.tolist(), self.pair_weight.tolist(), strict=True))
        bounds = pairwise(self.run_pair_start.tolist())
        spans = zip(self.run_start.tolist(), self.run_end.tolist(), bounds, strict=True)
        return [(start, end, tuple(pairs[first:last])) for start, end, (first, last) in spans]

    def to_bytes(self) -> bytes:
        """Packs the plan into one buffer: the sections' lengths, then the sections, all 64-bit."""
        sections = [getattr(self, field.name) for field in dataclasses.fields(self)]
        lengths = np.array([len(section) for section in sections], dtype=np.int64)
        return b"".join(array.tobytes() for array in (lengths, *sections))

    @classmethod
    def from_bytes(cls, buffer: bytes) -> Self:
        """Reads the plan that `to_bytes` wrote; its arrays are read-only views of `buffer`.

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
    """One sampled token. `logprob` is under the unmodified distribution; None unless requested."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The runner's result of a plan. The runner fills every field.

    Attributes:
        sampled: one token for each row of the plan's `sample_row`.
        device_s: seconds from the first kernel to the last result by the device's clock; None without one.
        waited_s: seconds that the device was idle since the step before; None without a device clock.
        prepare_s: the host's seconds for the inputs and, with an asynchronous device, for launching.
        run_s: seconds of the forward pass; with an asynchronous device, `device_s`.
        sample_s: seconds of sampling; with an asynchronous device, the host's wait for the tokens.
        scored: one token for each row of the plan's `score_row`, with its log-probability.
    """

    sampled: tuple[SampledToken, ...]
    device_s: float | None = None
    waited_s: float | None = None
    prepare_s: float | None = None
    run_s: float | None = None
    sample_s: float | None = None
    scored: tuple[SampledToken, ...] = ()
