"""One step of the model: the engine's plan (`StepPlan`) and the model's result (`StepOutput`)."""

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
    """The input of one forward pass, as flat int64 (`Ints`) and float64 (`Floats`) arrays.

    `engine/planning.py` fills every field from the schedule. `model/run/runner.py` reads them and changes
    none. Optional groups of fields are empty if no sequence of the step needs them.

    The step has T tokens of B sequences, one sequence after the other ("ragged row"); "row" means a token's
    index in it. It has R runs: contiguous tokens with the same mix, with P (slot, weight) pairs in total.
    Tokens outside all runs use no adapter. S tokens are sampled. A field `x_start` holds where each part of
    `x` begins, and last where the final part ends.

    Example with blocks of 4 tokens: sequence 0 decodes its sixth token, sequence 1 prefills three tokens with
    the adapter in slot 2::

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
    """[T]: position within the token's sequence, from 0."""
    slot_mapping: Ints
    """[T]: cell of the KV cache for the token's key and value: block * block_size + offset."""

    # Sequences.
    query_start: Ints
    """[B + 1]: first row of each sequence."""
    context_len: Ints
    """[B]: number of keys that the sequence's last token attends to, this step's tokens included."""
    block_start: Ints
    """[B + 1]: start of each sequence's block table in `blocks`."""
    blocks: Ints
    """[sum of the block tables' lengths]: the block tables, one after the other."""

    # Runs of one mix.
    run_start: Ints
    """[R]: first row."""
    run_end: Ints
    """[R]: row after the last."""
    run_pair_start: Ints
    """[R + 1]: start of each run's pairs in `pair_slot` and `pair_weight`."""
    pair_slot: Ints
    """[P]: device slot of an adapter."""
    pair_weight: Floats
    """[P]: factor for the adapter's delta."""

    # Sampling.
    sample_row: Ints
    """[S]: rows whose logits give the next token."""
    temperature: Floats
    """[S]: 0 is greedy."""
    top_k: Ints
    """[S]: 0 keeps all tokens."""
    top_p: Floats
    """[S]: in (0, 1]."""
    uniform: Floats
    """[S]: each token's random draw in [0, 1), a function of seed and position; 0 for greedy rows."""
    num_logprobs: Ints
    """[S]: number of alternatives to report with the token's log-probability; -1 reports nothing."""
    banned_start: Ints
    """[S + 1]: start of each sampled row's part of `banned_ids`."""
    banned_ids: Ints
    """[sum]: tokens that must not be sampled."""

    # Optional sampling parameters.
    min_p: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]: in [0, 1]; 0 keeps all tokens."""
    bias_start: Ints = dataclasses.field(default_factory=_nothing)
    """[S + 1]: start of each sampled row's part of `bias_ids` and `bias_value`."""
    bias_ids: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: tokens with a bias, each once per sampled row."""
    bias_value: Floats = dataclasses.field(default_factory=_no_floats)
    """[sum]: value added to the token's logit."""
    repetition_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]: 1 is none."""
    presence_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]: 0 is none."""
    frequency_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]: 0 is none."""
    seen_start: Ints = dataclasses.field(default_factory=_nothing)
    """[S + 1]: start of each sampled row's part of `seen_ids` and `seen_count`; empty without penalties."""
    seen_ids: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: tokens of the prompt and the answer so far, each once per sampled row."""
    seen_count: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: how often the answer contains the token; 0 if only the prompt does."""

    # Structured output: G of the sampled rows have a grammar.
    masked_row: Ints = dataclasses.field(default_factory=_nothing)
    """[G]: index into `sample_row`."""
    mask_words: Ints = dataclasses.field(default_factory=_nothing)
    """[G * words]: a bit per token of the base: token t is allowed if bit t % 64 of word t // 64 is 1."""

    # Prefix tuning: C copies of an adapter's keys and values to the KV cache, made before the pass.
    prefix_slot: Ints = dataclasses.field(default_factory=_nothing)
    """[C]: device slot of the adapter."""
    prefix_first: Ints = dataclasses.field(default_factory=_nothing)
    """[C]: the first virtual token to copy; the following ones are consecutive."""
    prefix_start: Ints = dataclasses.field(default_factory=_nothing)
    """[C + 1]: start of each copy's part of `prefix_cells`."""
    prefix_cells: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: cell of the KV cache for each virtual token."""

    # F tokens that the previous step samples, so that the host does not know them yet.
    fed_row: Ints = dataclasses.field(default_factory=_nothing)
    """[F]: row whose `token_ids` holds a placeholder."""
    fed_from: Ints = dataclasses.field(default_factory=_nothing)
    """[F]: index into the `sample_row` of the previously launched step, which samples the token."""

    # Log-probabilities of Q prompt tokens.
    score_row: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: the row before the token, whose logits score it."""
    score_id: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: the token's id."""
    score_top: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: number of alternatives to report with the token's log-probability."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_len)

    @property
    def logit_row(self) -> Ints:
        """Rows whose logits the step needs: the sampled ones, then the scored ones, [S + Q]."""
        return np.concatenate([self.sample_row, self.score_row]) if len(self.score_row) else self.sample_row

    @property
    def runs(self) -> list[tuple[int, int, tuple[tuple[int, float], ...]]]:
        """(first row, end, ((slot, weight), ...)) of each run; the LoRA batch is built from these."""
        pairs = list(zip(self.pair_slot.tolist(), self.pair_weight.tolist(), strict=True))
        bounds = pairwise(self.run_pair_start.tolist())
        spans = zip(self.run_start.tolist(), self.run_end.tolist(), bounds, strict=True)
        return [(start, end, tuple(pairs[first:last])) for start, end, (first, last) in spans]

    def to_bytes(self) -> bytes:
        """The plan in one buffer: the fields' lengths, then the fields, all as 64-bit numbers."""
        sections = [getattr(self, field.name) for field in dataclasses.fields(self)]
        lengths = np.array([len(section) for section in sections], dtype=np.int64)
        return b"".join(array.tobytes() for array in (lengths, *sections))

    @classmethod
    def from_bytes(cls, buffer: bytes) -> Self:
        """The plan that `to_bytes` wrote. Its arrays are read-only views of `buffer`.

        Raises:
            ValueError: the buffer's size does not fit its header.
        """
        fields = dataclasses.fields(cls)
        words = np.frombuffer(buffer, dtype=np.int64)
        lengths, words = words[: len(fields)], words[len(fields) :]
        if len(lengths) < len(fields) or lengths.min() < 0 or lengths.sum() != len(words):
            raise ValueError(f"not a step plan: {len(buffer)} bytes do not fit the header")
        sections = np.split(words, np.cumsum(lengths)[:-1])
        arrays: dict[str, Any] = {
            field.name: section.view(np.float64) if field.type == "Floats" else section
            for field, section in zip(fields, sections, strict=True)
        }
        return cls(**arrays)


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One sampled or scored token.

    Attributes:
        token_id: -1 if none could be sampled: its row's logits are not numbers, or every token is banned.
        logprob: under the model's unmodified distribution; None unless the request asked for it.
        top: (token id, log-probability) of the most probable tokens, best first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The result of a step; the runner fills every field. Times are in seconds.

    On a GPU, which runs asynchronously, the times of the host and of the device overlap. On a CPU there is
    no device clock, and `device_s` and `waited_s` are None.

    Attributes:
        sampled: one token for each of the plan's `sample_row`.
        device_s: from the step's first kernel to its last result, by the device's clock.
        waited_s: the device's idle time between the previous step and this one; None for the first step.
        prepare_s: the host's time to prepare the inputs; on a GPU, also to launch the step.
        run_s: the forward pass on a CPU; on a GPU the same as `device_s`.
        sample_s: the sampling on a CPU; on a GPU the host's wait for the tokens.
        scored: the token of each of the plan's `score_row`, with its log-probability.
    """

    sampled: tuple[SampledToken, ...]
    device_s: float | None = None
    waited_s: float | None = None
    prepare_s: float | None = None
    run_s: float | None = None
    sample_s: float | None = None
    scored: tuple[SampledToken, ...] = ()
