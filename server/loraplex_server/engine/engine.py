"""The step loop's body: plan, run, commit, emit. The engine is the only owner of request state.

A step that fails ends the requests that were in it, and no others; a device that no longer computes ends the
engine.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, wait
from itertools import islice
from typing import Protocol

import msgspec

from loraplex_server.adapters.residency.inspection import unloaded
from loraplex_server.adapters.residency.record import AdapterHandle
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.config import EngineConfig
from loraplex_server.core.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
    ServerError,
)
from loraplex_server.core.request import FinishReason, Request
from loraplex_server.core.step import SampledToken, StepOutput, StepPlan
from loraplex_server.engine.audit import Audit, finish
from loraplex_server.engine.constraint import Constraint
from loraplex_server.engine.drafts import Drafter
from loraplex_server.engine.grammars import Grammars, no_tokens
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.scheduler import Scheduled, Scheduler
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.wire.commands import IntegrityReport
from loraplex_server.wire.messages import (
    EngineInfo,
    Failed,
    Times,
    TokenDelta,
    TokenLogprobs,
    Tokens,
    TopLogprob,
)
from loraplex_server.wire.stats import Stats, StepRecord

_log = logging.getLogger(__name__)

COMPILE_S = 30.0
"""Longest that a request waits for its structure to be compiled."""

# Longest that a step waits to learn what may come next; mostly it is known before.
_FOLLOW_S = 0.005

Emit = Callable[[str, Tokens | Failed], None]
"""Sends a message to the client of that id."""


class Launched(Protocol):
    """A step that may still be running."""

    def result(self) -> StepOutput:
        """One token for each of the plan's `sample_row`, once they are there."""


class Runner(Protocol):
    """What the engine needs of the model side."""

    @property
    def asynchronous(self) -> bool:
        """Whether `launch` returns before the step is computed."""

    def launch(self, plan: StepPlan) -> Launched:
        """Computes the plan and samples, in the order of the calls; `fed_from` is of the call before."""

    def usable(self) -> bool:
        """Whether the device still computes; asked after a step that failed."""

    def weight_checksum(self) -> Generator[None, None, str]:
        """SHA-256 over the resident base weights, in pieces: yields between them, returns it at the end."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step from its launch until its tokens are there.

    Attributes:
        scheduled: what it computes, in the order of the batch, how many tokens are sampled after it, and how
            many tokens of the prompt are scored.
        in_stride: the device had the step before to compute when this one was launched.
        record: without the times that are known at its end.
    """

    launched: Launched
    scheduled: list[tuple[Scheduled, int, int]]
    started_s: float
    in_stride: bool
    record: StepRecord


class Engine:
    """Requests in, tokens out. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        adapters: AdapterStore,
        info: EngineInfo,
        emit: Emit,
        grammars: Grammars | None = None,
    ) -> None:
        self.info = info
        self.adapters = adapters
        self._runner = runner
        self._emit = emit
        self._max_queue = config.scheduler.max_queue
        self._max_adapters = config.adapters.max_per_request
        self._blocks = KvBlockPool(info.kv_blocks, info.kv_block_size)
        self.scheduler = Scheduler(config.scheduler, self._blocks, adapters.requests)
        self._sequences: dict[tuple[str, str], Sequence] = {}
        self._grammars = grammars or Grammars(no_tokens, info.vocab_size)
        # Requests that go to the scheduler once their structures are compiled.
        self._compiling: dict[Sequence, Future[Constraint]] = {}
        # Requests whose grammars look what may come after their last tokens.
        self._following: dict[Future[None], Sequence] = {}
        self._steps: list[StepRecord] = []
        self._failed_steps = 0
        self._hits = self._misses = 0
        # The step that the device computes, where the engine is ahead of it.
        self._in_flight: _Step | None = None
        self._collected_s = 0.0
        # Names of adapters whose unloading waits no longer than until then.
        self._drains: dict[object, tuple[str, float]] = {}
        self._prefix_cache = config.scheduler.prefix_cache
        self._prefix_queries = self._prefix_hits = 0
        self._speculative_tokens = config.scheduler.speculative_tokens
        self._audit = Audit(self._problems, runner.weight_checksum, info.weight_checksum)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None or bool(self._compiling)

    @property
    def _num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._compiling)

    def submit(self, client: str, request: Request) -> None:
        """Queues a request. One that cannot be served is answered with `Failed` at once."""
        try:
            self._add(client, request)
        except ServerError as error:
            self._emit(client, Failed(request.request_id, error.info))

    def cancel(self, client: str, request_id: str) -> None:
        """Forgets a request and frees what it holds; nothing is emitted."""
        sequence = self._sequences.get((client, request_id))
        if sequence is not None:
            self._retire(sequence)

    def cancel_client(self, client: str) -> None:
        """Forgets every request of a client that is gone."""
        for owner, request_id in list(self._sequences):
            if owner == client:
                self.cancel(owner, request_id)

    def unload(self, name: str, grace_s: float | None, done: Callable[[], None]) -> None:
        """As `AdapterStore.unload`; requests that hold the adapter after `grace_s` seconds get CANCELLED.

        None lets them run to their end.
        """
        key = object()

        def freed() -> None:
            self._drains.pop(key, None)
            done()

        if grace_s is not None:
            self._drains[key] = name, time.monotonic() + grace_s
        try:
            self.adapters.unload(name, freed)
        except ServerError:
            self._drains.pop(key, None)
            raise

    def step(self) -> bool:
        """Advances every request that can be. False if nothing could: all wait for adapters.

        Where the runner is asynchronous it is one step ahead: the next step is launched before the tokens of
        the one that runs are there, and gets them on the device.

        Raises:
            Exception: whatever a step failed with, if the device does not compute any more.
        """
        ahead, failed = self._runner.asynchronous, self._failed_steps
        launched = self._launch(time.monotonic())
        due = launched
        if ahead:
            due, self._in_flight = self._in_flight, launched
        elif launched is not None:
            self._advance(launched)
        if due is not None:
            self._collect(due)
        if ahead and launched is not None:
            self._advance(launched)
        return launched is not None or due is not None or self._failed_steps > failed

    def _launch(self, started_s: float) -> _Step | None:
        """Plans and launches the next step; None if no request can be advanced, or the step failed."""
        self._end_drains(started_s)
        self.adapters.poll()
        self._take_followed()
        self._take_compiled(started_s)
        schedule = self.scheduler.schedule(started_s)
        for sequence, error in schedule.failed:
            self._fail(sequence, error)
        if not schedule.scheduled:
            return None
        self._audit.worked()
        try:
            scheduled = sorted(schedule.scheduled, key=self._batch_position)
            slot, eos_token_ids = self.adapters.requests.slot, self.info.eos_token_ids
            plan = build_plan(scheduled, self._blocks.block_size, slot, eos_token_ids)
            planned_s = time.monotonic()
            launched = self._runner.launch(plan)
        except Exception as error:
            self._give_up([item.sequence for item in schedule.scheduled], error)
            return None
        prefill_tokens = sum(item.num_tokens for item in scheduled if item.sequence.num_pending > 1)
        return _Step(
            launched=launched,
            scheduled=[(item, item.num_samples, len(item.scores)) for item in scheduled],
            started_s=started_s,
            in_stride=self._in_flight is not None,
            record=StepRecord(
                seconds=0.0,
                plan_seconds=planned_s - started_s,
                requests=plan.num_sequences,
                prefill_tokens=prefill_tokens,
                decode_tokens=plan.num_tokens - prefill_tokens,
                adapters=len(set(plan.pair_slot.tolist())),
                preemptions=schedule.preemptions,
                drafted_tokens=sum(len(item.drafts) for item in scheduled),
            ),
        )

    def _advance(self, step: _Step) -> None:
        """Takes what a launched step computes as computed, and its tokens as there, though not known yet.

        A request that ends with it, or that cannot go on without knowing it, gets no such token: it is not
        scheduled until it is known.
        """
        samples = 0
        for item, num_samples, num_scores in step.scheduled:
            sequence = item.sequence
            samples += num_samples
            if sequence.status is Status.FINISHED:
                continue
            sequence.num_computed += item.num_tokens
            sequence.scored_to += num_scores
            if num_samples and self._runner.asynchronous and not self._must_know(item):
                sequence.token_ids.append(0)
                sequence.awaited = samples - 1

    def _must_know(self, item: Scheduled) -> bool:
        """Whether the host has to know a sequence's next token before there can be another."""
        sequence, sampling = item.sequence, item.sequence.request.sampling
        return (
            self._is_last(sequence, 1)
            or sampling.penalised
            or bool(sampling.bad_words)
            or sequence.constraint is not None
            or bool(item.drafts)
            or self.scheduler.speculates(sequence, len(sequence.token_ids) + 1)
        )

    def _is_last(self, sequence: Sequence, more: int = 0) -> bool:
        """Whether with `more` tokens than it has a sequence is as long as it may be."""
        return (
            sequence.num_generated + more >= sequence.request.sampling.max_tokens
            or len(sequence.token_ids) + more >= self.info.max_model_len
        )

    def _collect(self, step: _Step) -> None:
        """Waits for a launched step, writes its results into the sequences, and emits."""
        try:
            output = step.launched.result()
        except Exception as error:
            self._give_up([item.sequence for item, *_ in step.scheduled], error)
            return
        received_s = time.monotonic()
        accepted = self._commit(step, output)
        now_s = time.monotonic()
        begun_s, self._collected_s = max(step.started_s, self._collected_s), now_s
        self._steps.append(
            msgspec.structs.replace(
                step.record,
                seconds=now_s - begun_s,
                device_seconds=output.device_s,
                idle_seconds=output.waited_s if step.in_stride else None,
                prepare_seconds=output.prepare_s,
                run_seconds=output.run_s,
                sample_seconds=output.sample_s,
                emit_seconds=now_s - received_s,
                accepted_tokens=accepted,
            )
        )

    def _give_up(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """Ends the requests of a step that failed; what it wrote lies in blocks that only they had.

        Raises:
            Exception: `error`, if the device does not compute any more.
        """
        if not self._runner.usable():
            raise error
        self._failed_steps += 1
        lost = [sequence for sequence in sequences if sequence.status is not Status.FINISHED]
        _log.error("a step failed, and with it %s", [one.request.request_id for one in lost], exc_info=error)
        failure = InternalError(f"the step failed: {error.__class__.__name__}")
        for sequence in lost:
            self._emit(sequence.client, Failed(sequence.request.request_id, failure.info))
            self._retire(sequence)

    def idle(self) -> bool:
        """Looks after the engine while there is nothing to step; whether there is more to do at once."""
        return self._audit.idle()

    def stats(self) -> Stats:
        """What happened since the last call, and the state now."""
        steps, self._steps = tuple(self._steps), []
        failed_steps, self._failed_steps = self._failed_steps, 0
        adapters, activity = self.adapters, self.adapters.activity
        hits, misses = activity.hits - self._hits, activity.misses - self._misses
        self._hits, self._misses = activity.hits, activity.misses
        scheduler = self.scheduler
        prefix_queries = scheduler.prefix_queries - self._prefix_queries
        prefix_hits = scheduler.prefix_hits - self._prefix_hits
        self._prefix_queries, self._prefix_hits = scheduler.prefix_queries, scheduler.prefix_hits
        return Stats(
            steps=steps,
            failed_steps=failed_steps,
            swaps=tuple(activity.drain_swaps()),
            waiting=self._num_waiting,
            running=len(self.scheduler.running),
            waiting_for_adapter=self.scheduler.num_waiting_for_adapter,
            kv_blocks_used=self._blocks.num_used,
            kv_blocks=self._blocks.num_blocks,
            adapter_device_bytes_used=adapters.device_bytes_used,
            adapter_host_bytes_used=adapters.host_bytes_used,
            adapters_on_device=adapters.on_device,
            adapters_on_host=adapters.on_host,
            adapter_hits=hits,
            adapter_misses=misses,
            integrity_problems=len(self._audit.problems),
            weights_ok=self._audit.weights_ok,
            audits=self._audit.passes,
            adapters_running=_adapter_names(self.scheduler.running),
            adapters_waiting=_adapter_names(self.scheduler.waiting),
            kv_blocks_cached=self._blocks.num_cached,
            prefix_queries=prefix_queries,
            prefix_hits=prefix_hits,
        )

    def check_integrity(self) -> IntegrityReport:
        """Compares every pool with its holders, and the weights with their checksum."""
        problems = self._problems()
        checksum = finish(self._runner.weight_checksum())
        if checksum != self.info.weight_checksum:
            problems.append("the base weights have changed since they were loaded")
        return IntegrityReport(
            problems=tuple(problems),
            running=len(self.scheduler.running),
            waiting=self._num_waiting,
            kv_blocks_used=self._blocks.num_used,
            adapter_references=self.adapters.requests.references(),
            weight_checksum=checksum,
        )

    def _problems(self) -> list[str]:
        """A line for each disagreement between a pool and its holders."""
        problems = self.scheduler.check_integrity() + self.adapters.check_integrity()
        held = sum(len(sequence.handles) for sequence in self._sequences.values())
        counted = self.adapters.requests.references()
        if counted != held:
            problems.append(f"the adapter store counts {counted} references, requests hold {held}")
        return problems

    def _add(self, client: str, request: Request) -> None:
        limit = self.info.max_model_len
        if not request.prompt_token_ids:
            raise InvalidArgumentError.field("prompt", "is empty; give at least one token")
        if len(request.prompt_token_ids) >= limit:
            raise InvalidArgumentError.field(
                "prompt", f"has {len(request.prompt_token_ids)} tokens; this server takes fewer than {limit}"
            )
        if min(request.prompt_token_ids) < 0:
            raise InvalidArgumentError.field(
                "prompt", f"has a token id outside the vocabulary of {self.info.vocab_size}"
            )
        if len(request.adapters) > self._max_adapters:
            raise InvalidArgumentError.field(
                "adapters", f"{len(request.adapters)} named; this server takes {self._max_adapters} at most"
            )
        names = [use.name for use in request.adapters]
        if len(set(names)) < len(names):
            raise InvalidArgumentError.field("adapters", "one adapter is named twice; add its weights up")
        if (client, request.request_id) in self._sequences:
            raise InvalidArgumentError.field("request_id", f"{request.request_id!r} is running already")
        if self._num_waiting >= self._max_queue:
            raise ResourceExhaustedError(
                f"{self._num_waiting} requests wait already; try again later",
                resource=("queue", "waiting requests"),
                retry_after_s=1.0,
                reason=Reason.QUEUE_FULL,
            )
        weights = [use.weight for use in request.adapters]
        handles = self.adapters.requests.resolve(names, weights)
        try:
            self._check_tokens(request, handles)
            public = self._prefix_cache and request.cache_prefix
            group = (client, request.group) if request.group and not public else None
            sequence = Sequence(request, client, handles, caches=public or group is not None, group=group)
            sequence.drafter = self._drafter(sequence)
            if sequence.num_prompt >= limit:
                raise InvalidArgumentError.field(
                    "prompt",
                    f"has {sequence.num_prompt} tokens with the adapter's soft prompt; this server takes "
                    f"fewer than {limit}",
                )
        except BaseException:
            self.adapters.requests.release(handles)
            raise
        self._sequences[client, request.request_id] = sequence
        if request.structure is None:
            self.scheduler.add(sequence)
        else:
            self._compiling[sequence] = self._grammars.start(request.structure)

    def _take_compiled(self, now_s: float) -> None:
        """Queues the requests whose structures are compiled; ends those that cannot be, or wait too long."""
        for sequence, compilation in list(self._compiling.items()):
            deadline_s = sequence.request.deadline_s
            try:
                if compilation.done():
                    # A panic in the grammar's library is no Exception.
                    raised = compilation.exception()
                    if raised is not None and not isinstance(raised, ServerError):
                        _log.error("a structure could not be compiled", exc_info=raised)
                        raise InternalError("the structure could not be compiled") from raised
                    sequence.constraint = compilation.result()
                elif deadline_s is not None and deadline_s <= time.time():
                    raise DeadlineExceededError("the deadline passed before the structure was compiled")
                elif now_s - sequence.arrival_s > COMPILE_S:
                    raise ResourceExhaustedError(
                        f"the structure was not compiled in {COMPILE_S:g} s; make it simpler, or try again",
                        retry_after_s=1.0,
                    )
                else:
                    continue
            except ServerError as error:
                self._fail(sequence, error)
                continue
            del self._compiling[sequence]
            self.scheduler.add(sequence)

    def _take_followed(self) -> None:
        """Ends the answers that are whole or cannot go on; the others are scheduled again.

        Waits a moment for those that are not known yet, so that they need not sit out a step.
        """
        if not self._following:
            return
        for future in wait(self._following, _FOLLOW_S).done:
            sequence = self._following.pop(future)
            held, structure = sequence.constraint, sequence.request.structure
            if sequence.status is Status.FINISHED:
                continue
            assert held is not None
            assert structure is not None
            if (raised := future.exception()) is not None:
                _log.error("a structure could not be followed", exc_info=raised)
                self._fail(sequence, InternalError("the structure could not be followed"))
            elif held.complete:
                self._finish(sequence, FinishReason.STOP)
            elif self._is_last(sequence):
                self._finish(sequence, FinishReason.LENGTH)
            elif held.error:
                # Whatever the others found out is too much for a new one, too.
                self._grammars.forget(structure)
                said = f"cannot be followed any further: {held.error}"
                self._fail(sequence, InvalidArgumentError.field(f"structure.{structure.kind}", said))
            else:
                held.ready = True

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a request all of whose tokens were emitted."""
        times = _times(sequence, time.monotonic())
        delta = TokenDelta(sequence.request.request_id, (), finish=reason, times=times)
        self._emit(sequence.client, Tokens((delta,)))
        self._retire(sequence)

    def _drafter(self, sequence: Sequence) -> Drafter | None:
        request = sequence.request
        most = request.speculative_tokens
        most = self._speculative_tokens if most is None else most
        # What a grammar allows after a guess is not known before the guess is known to be right.
        if not most or request.structure is not None:
            return None
        limit = min(sequence.num_prompt + request.sampling.max_tokens, self.info.max_model_len)
        # Where the engine runs ahead, who guesses sits out every other step.
        worth = 2 if self._runner.asynchronous else 1
        return Drafter(most, limit, first=sequence.num_virtual, worth=worth)

    def _check_tokens(self, request: Request, handles: tuple[AdapterHandle, ...]) -> None:
        """Every token id that the request names is the base's, or one that its adapter adds."""
        known = self.info.vocab_size + max((handle.added_tokens for handle in handles), default=0)
        for field, ids in (
            ("prompt", request.prompt_token_ids),
            ("stop_token_ids", request.sampling.stop_token_ids),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        ):
            if ids and max(ids) >= known:
                raise InvalidArgumentError.field(
                    field,
                    f"has a token id outside the vocabulary of {known}"
                    + (", the adapter's added tokens included" if known > self.info.vocab_size else ""),
                )

    def _batch_position(self, item: Scheduled) -> tuple[bool, list[int]]:
        """Decodes first, then chunks; within either, one adapter's rows together: fewer, larger tiles."""
        return item.num_tokens > 1, [self.adapters.requests.slot(handle) for handle in item.sequence.handles]

    def _commit(self, step: _Step, output: StepOutput) -> int:
        """Writes a step's tokens into the sequences, ends those that are complete, and emits.

        Returns how many guesses were right.
        """
        deltas: defaultdict[str, list[TokenDelta]] = defaultdict(list)
        sampled, scored = iter(output.sampled), iter(output.scored)
        accepted, now_s = 0, time.monotonic()
        for item, num_samples, num_scores in step.scheduled:
            sequence = item.sequence
            tokens = tuple(islice(sampled, num_samples))
            scores = tuple(map(_logprobs, islice(scored, num_scores))) if num_scores else ()
            # Cancelled, or complete one step before: what was computed ahead is dropped.
            if sequence.status is Status.FINISHED:
                continue
            try:
                _check_scores(scores)
                tokens, finish = self._extend(sequence, tokens, item.drafts)
            except FailedPreconditionError as error:
                self._fail(sequence, error)
                continue
            if item.drafts:
                accepted += self._settle(item, len(tokens) - 1)
            self.scheduler.name_blocks(sequence)
            if tokens or scores or finish is not None:
                deltas[sequence.client].append(self._delta(sequence, tokens, scores, finish, now_s))
        for client, found in deltas.items():
            self._emit(client, Tokens(tuple(found)))
        return accepted

    def _extend(
        self, sequence: Sequence, sampled: tuple[SampledToken, ...], drafts: tuple[int, ...]
    ) -> tuple[tuple[SampledToken, ...], FinishReason | None]:
        """Writes tokens into a sequence up to the first that is not as guessed, or ends it.

        Returns those, and why it ends.

        Raises:
            FailedPreconditionError: there is no such token.
        """
        if sampled and not sequence.request.sampling.max_tokens:
            # There is no step without a token where a prompt ends: it is dropped.
            return (), FinishReason.LENGTH
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
            if finish is None and sequence.constraint is not None:
                # Whether it is the last is known once the grammar has seen it.
                sequence.constraint.ready = False
                self._following[self._grammars.follow(sequence.constraint, token.token_id)] = sequence
            if finish is not None or drafts[count - 1 : count] != (token.token_id,):
                return sampled[:count], finish
        return (), None

    def _why_ended(self, sequence: Sequence) -> FinishReason | None:
        """Whether a sequence ends with its last token, as far as it takes no grammar to say so."""
        token_id, sampling = sequence.token_ids[-1], sequence.request.sampling
        held = sequence.constraint is not None
        if token_id in sampling.stop_token_ids or (
            token_id in self.info.eos_token_ids and (held or not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if not held and self._is_last(sequence) else None

    def _settle(self, item: Scheduled, right: int) -> int:
        """Keeps what was computed of so many right guesses and forgets the others. Returns the former."""
        sequence = item.sequence
        assert sequence.drafter is not None
        sequence.drafter.judge(len(item.drafts), right, len(sequence.token_ids))
        # Preempted since, it has nothing that is computed.
        if sequence.status is Status.RUNNING:
            sequence.num_computed += right
            self.scheduler.give_back(sequence)
        return right

    def _delta(
        self,
        sequence: Sequence,
        tokens: tuple[SampledToken, ...],
        scores: tuple[TokenLogprobs, ...],
        finish: FinishReason | None,
        now_s: float,
    ) -> TokenDelta:
        """What the client is told of new tokens and the prompt's scores; ends a sequence that is complete."""
        first = bool(tokens) and sequence.first_token_s is None
        if first:
            sequence.first_token_s = now_s
        times = _times(sequence, now_s) if first or finish is not None else None
        if finish is not None:
            self._retire(sequence)
        return TokenDelta(
            sequence.request.request_id,
            tuple(token.token_id for token in tokens),
            tuple(_logprobs(token) for token in tokens if token.logprob is not None),
            finish=finish,
            stop_token=finish is FinishReason.STOP,
            times=times,
            prompt_logprobs=scores,
        )

    def _end_drains(self, now_s: float) -> None:
        """Ends the requests that hold an adapter whose time to drain is over."""
        for key, (name, end_s) in list(self._drains.items()):
            if now_s < end_s:
                continue
            self._drains.pop(key, None)
            error = unloaded(name)
            for sequence in list(self._sequences.values()):
                if any(handle.draining and handle.name == name for handle in sequence.handles):
                    self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: ServerError) -> None:
        """Ends a request with an error."""
        self._emit(sequence.client, Failed(sequence.request.request_id, error.info))
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Frees all that a sequence holds and forgets it; safe to call twice."""
        if (compilation := self._compiling.pop(sequence, None)) is not None:
            compilation.cancel()
            sequence.status = Status.FINISHED
        self.scheduler.finish(sequence)
        if self._sequences.pop((sequence.client, sequence.request.request_id), None) is not None:
            self.adapters.requests.release(sequence.handles)
        assert sequence.status is Status.FINISHED


def _check_scores(scores: tuple[TokenLogprobs, ...]) -> None:
    """Raises: FailedPreconditionError where they are no numbers."""
    if any(math.isnan(score.logprob) for score in scores):
        raise FailedPreconditionError(
            "the prompt cannot be scored: the logits are not finite; check the adapters' weights"
        )


def _logprobs(token: SampledToken) -> TokenLogprobs:
    assert token.logprob is not None
    top = tuple(TopLogprob(token_id, logprob) for token_id, logprob in token.top)
    return TokenLogprobs(token.token_id, token.logprob, top)


def _adapter_names(sequences: list[Sequence]) -> tuple[str, ...]:
    return tuple({handle.name for sequence in sequences for handle in sequence.handles})


def _times(sequence: Sequence, now_s: float) -> Times:
    arrival_s = sequence.arrival_s
    first_scheduled_s = sequence.first_scheduled_s or now_s
    return Times(
        queue_s=first_scheduled_s - arrival_s,
        adapter_wait_s=sequence.adapter_wait_s,
        first_token_s=(sequence.first_token_s or now_s) - arrival_s,
        total_s=now_s - arrival_s,
        preemptions=sequence.preemptions,
        cached_prompt_tokens=sequence.cached_prompt_tokens,
        drafted_tokens=sequence.drafter.drafted if sequence.drafter else 0,
        accepted_tokens=sequence.drafter.accepted if sequence.drafter else 0,
    )
