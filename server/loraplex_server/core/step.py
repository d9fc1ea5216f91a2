"""One step of the model: what the host plans (`StepPlan`), and what comes back of it (`StepOutput`)."""

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
    """What the runner computes in one pass, as flat arrays; `to_bytes` puts them in one buffer for others.

    `engine/planning.py` fills every field, from the schedule; `model/run/runner.py` reads them and changes
    none. Groups that few requests ask for are empty where no sequence of the step does.

    Shapes: T tokens of B sequences stand in one ragged row. R runs are contiguous tokens of one mix, with P
    (slot, weight) pairs in all; tokens in no run have no adapter. S tokens are sampled. A field `x_start`
    says where the parts of `x` begin, and where the last one ends. Example, with blocks of 4: sequence 0
    decodes its sixth token, sequence 1 prefills three, and adapter slot 2 belongs to sequence 1::

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
    """[T]: cell of the KV cache that the token is written to: block * block_size + offset."""

    # Sequences.
    query_start: Ints
    """[B + 1]: the sequence's first row."""
    context_len: Ints
    """[B]: keys visible to the sequence's last token, this step's tokens included."""
    block_start: Ints
    """[B + 1], into `blocks`."""
    blocks: Ints
    """[sum of the block tables' lengths]: the block tables, one after the other."""

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
    """[P]: what its delta is multiplied by."""

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
    """[S]; -1 for none, else how many alternatives beside the chosen token."""
    banned_start: Ints
    """[S + 1], into `banned_ids`."""
    banned_ids: Ints
    """[sum]: tokens that must not be sampled."""

    # Sampling, as few requests ask for it.
    min_p: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    bias_start: Ints = dataclasses.field(default_factory=_nothing)
    """[S + 1], into `bias_ids` and `bias_value`."""
    bias_ids: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: tokens with a bias; in a row each once."""
    bias_value: Floats = dataclasses.field(default_factory=_no_floats)
    """[sum]: what is added to their logits."""
    repetition_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    presence_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    frequency_penalty: Floats = dataclasses.field(default_factory=_no_floats)
    """[S]"""
    seen_start: Ints = dataclasses.field(default_factory=_nothing)
    """[S + 1], into `seen_ids` and `seen_count`; rows without penalties have none."""
    seen_ids: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: tokens of the prompt and the answer so far; in a row each once."""
    seen_count: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: how often the answer has them; 0 for those of the prompt alone."""

    # Grammars: G of the sampled rows have one.
    masked_row: Ints = dataclasses.field(default_factory=_nothing)
    """[G]: index into `sample_row`."""
    mask_words: Ints = dataclasses.field(default_factory=_nothing)
    """[G * words]: a bit for every token of the base model, bit t % 64 of word t // 64; 1 is allowed."""

    # Prefixes: C copies of an adapter's keys and values to the KV cache, before the pass.
    prefix_slot: Ints = dataclasses.field(default_factory=_nothing)
    """[C]: device slot of the adapter."""
    prefix_first: Ints = dataclasses.field(default_factory=_nothing)
    """[C]: the first virtual token that is copied; those after it follow."""
    prefix_start: Ints = dataclasses.field(default_factory=_nothing)
    """[C + 1], into `prefix_cells`."""
    prefix_cells: Ints = dataclasses.field(default_factory=_nothing)
    """[sum]: cell of the KV cache for each virtual token."""

    # Tokens that the host does not know yet: F of them.
    fed_row: Ints = dataclasses.field(default_factory=_nothing)
    """[F]: row whose `token_ids` holds a placeholder."""
    fed_from: Ints = dataclasses.field(default_factory=_nothing)
    """[F]: index into the `sample_row` of the step launched before this one, which samples the token."""

    # Scores: Q tokens of prompts whose log-probability is asked for.
    score_row: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: the row before the token."""
    score_id: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: the token."""
    score_top: Ints = dataclasses.field(default_factory=_nothing)
    """[Q]: how many alternatives beside it."""

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
    """What the runner gives back of a plan. The runner fills every field.

    Attributes:
        sampled: one token for each of the plan's `sample_row`.
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
