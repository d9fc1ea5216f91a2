"""From what a step computed to the sequences in it: new tokens, verified drafts, and the ends of answers."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from itertools import islice
from typing import NamedTuple

from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.core.request import FinishReason
from loraplex_server.core.runner import Launched
from loraplex_server.core.step import SampledToken, StepOutput
from loraplex_server.engine.emission import token_delta, token_logprobs
from loraplex_server.engine.schedule import FailedSequence, Scheduled
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.engine.structured_output import StructuredOutput
from loraplex_server.wire.messages import TokenDelta, TokenLogprobs
from loraplex_server.wire.stats import StepRecord


class Computed(NamedTuple):
    """One sequence's part in a launched step.

    Attributes:
        num_samples: tokens that are sampled after it.
        num_scores: tokens of the prompt that are scored.
    """

    item: Scheduled
    num_samples: int
    num_scores: int


@dataclasses.dataclass(frozen=True)
class LaunchedStep:
    """A step from its launch until its tokens are there.

    Attributes:
        computed: in the order of the batch.
        in_stride: the device had the step before to compute when this one was launched.
        record: without the times that are known at its end.
    """

    launched: Launched
    computed: list[Computed]
    started_s: float
    in_stride: bool
    record: StepRecord

    @property
    def sequences(self) -> list[Sequence]:
        return [computed.item.sequence for computed in self.computed]


@dataclasses.dataclass
class Committed:
    """A step whose results are in its sequences.

    Attributes:
        received_s: when its results were there.
        deltas: for each client, what it is to be told.
        finished: sequences whose answers are complete.
        failed: sequences that have no next token.
        num_accepted: draft tokens that were accepted.
    """

    step: LaunchedStep
    output: StepOutput
    received_s: float
    deltas: defaultdict[str, list[TokenDelta]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    finished: list[Sequence] = dataclasses.field(default_factory=list)
    failed: list[FailedSequence] = dataclasses.field(default_factory=list)
    num_accepted: int = 0


class _Extension(NamedTuple):
    """The tokens that a sequence got of those sampled, and why it ends with them, if it does."""

    tokens: tuple[SampledToken, ...]
    finish: FinishReason | None = None


class Committer:
    """Writes what steps computed into their sequences.

    Args:
        eos_token_ids: end an answer, unless its request ignores them.
    """

    def __init__(
        self, scheduler: Scheduler, structured: StructuredOutput, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._scheduler = scheduler
        self._structured = structured
        self._eos_token_ids = eos_token_ids

    def commit(self, step: LaunchedStep, output: StepOutput, now_s: float) -> Committed:
        """Extends every sequence of a step by its tokens; retires none."""
        committed = Committed(step, output, now_s)
        sampled, scored = iter(output.sampled), iter(output.scored)
        for item, num_samples, num_scores in step.computed:
            sequence = item.sequence
            tokens = tuple(islice(sampled, num_samples))
            scores = tuple(map(token_logprobs, islice(scored, num_scores))) if num_scores else ()
            # Cancelled, or complete one step before: what was computed ahead is dropped.
            if sequence.status is Status.FINISHED:
                continue
            try:
                _check_scores(scores)
                tokens, finish = self._extend(sequence, tokens, item.drafts)
            except FailedPreconditionError as error:
                committed.failed.append(FailedSequence(sequence, error))
                continue
            if item.drafts:
                committed.num_accepted += self._settle_drafts(item, len(tokens) - 1)
            self._scheduler.name_blocks(sequence)
            if tokens and sequence.first_token_s is None:
                sequence.first_token_s = now_s
            if tokens or scores or finish is not None:
                delta = token_delta(sequence, tokens, scores, finish, now_s)
                committed.deltas[sequence.client].append(delta)
            if finish is not None:
                committed.finished.append(sequence)
        return committed

    def _extend(
        self, sequence: Sequence, sampled: tuple[SampledToken, ...], drafts: tuple[int, ...]
    ) -> _Extension:
        """Writes tokens into a sequence, up to the first that is not as drafted, or ends it.

        Raises:
            FailedPreconditionError: there is no such token.
        """
        if sampled and not sequence.request.sampling.max_tokens:
            # There is no step without a token where a prompt ends: it is dropped.
            return _Extension((), FinishReason.LENGTH)
        if sampled and sequence.awaited is not None:
            sequence.token_ids.pop()
            sequence.awaited = None
        for count, token in enumerate(sampled, 1):
            if token.token_id < 0:
                raise FailedPreconditionError(
                    "there is no next token: the logits are not finite, or every token is banned; check the "
                    "adapters' weights, penalties, biases and bad words"
                )
            sequence.token_ids.append(token.token_id)
            finish = self._why_ended(sequence)
            if finish is None and sequence.matcher is not None:
                # Whether it is the last is known once the grammar has seen it.
                self._structured.follow(sequence, token.token_id)
            if finish is not None or drafts[count - 1 : count] != (token.token_id,):
                return _Extension(sampled[:count], finish)
        return _Extension(())

    def _why_ended(self, sequence: Sequence) -> FinishReason | None:
        """The reason for which a sequence ends with its last token, unless only its grammar knows one."""
        token_id, sampling = sequence.token_ids[-1], sequence.request.sampling
        held = sequence.matcher is not None
        if token_id in sampling.stop_token_ids or (
            token_id in self._eos_token_ids and (held or not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if not held and sequence.is_full() else None

    def _settle_drafts(self, item: Scheduled, accepted: int) -> int:
        """Keeps what was computed of accepted drafts and forgets the rejected. Returns how many it kept."""
        sequence = item.sequence
        assert sequence.drafter is not None
        sequence.drafter.judge(len(item.drafts), accepted, len(sequence.token_ids))
        # Preempted since, it has nothing that is computed.
        if sequence.status is Status.RUNNING:
            sequence.num_computed += accepted
            self._scheduler.give_back(sequence)
        return accepted


def _check_scores(scores: tuple[TokenLogprobs, ...]) -> None:
    """Raises: FailedPreconditionError where they are no numbers."""
    if any(math.isnan(score.logprob) for score in scores):
        raise FailedPreconditionError(
            "the prompt cannot be scored: the logits are not finite; check the adapters' weights"
        )
