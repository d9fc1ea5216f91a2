"""The step loop's body: plan, run, commit, emit. The engine is the only owner of request state.

A step that fails ends the requests that were in it, and no others; a device that no longer computes ends the
engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from loraplex_server.adapters.residency.inspection import unloaded
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.config import EngineConfig
from loraplex_server.core.errors import InternalError, InvalidArgumentError, ServerError
from loraplex_server.core.request import FinishReason, Request
from loraplex_server.core.runner import Runner
from loraplex_server.engine.admission import Admission
from loraplex_server.engine.audit import Audit, pool_problems
from loraplex_server.engine.commit import Committed, Committer, Computed, LaunchedStep
from loraplex_server.engine.drains import Drains
from loraplex_server.engine.emission import last_delta
from loraplex_server.engine.grammars import Grammars, no_tokens
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.schedule import Schedule, Scheduled
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.engine.stats import StatsRecorder, begun_record
from loraplex_server.engine.structured_output import StructuredOutput
from loraplex_server.wire.commands import IntegrityReport
from loraplex_server.wire.messages import EngineInfo, Failed, Tokens
from loraplex_server.wire.stats import Stats

_log = logging.getLogger(__name__)

Emit = Callable[[str, Tokens | Failed], None]
"""Sends a message to the client of that id."""


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
        self._sequences: dict[tuple[str, str], Sequence] = {}
        blocks = KvBlockPool(info.kv_blocks, info.kv_block_size)
        self._blocks = blocks
        self.scheduler = Scheduler(config.scheduler, blocks, adapters.requests)
        self._admission = Admission(config, info, adapters.requests)
        self._structured = StructuredOutput(grammars or Grammars(no_tokens, info.vocab_size))
        self._committer = Committer(self.scheduler, self._structured, info.eos_token_ids)
        self._drains = Drains(adapters)
        self._audit = Audit(self._problems, runner.weight_checksum, info.weight_checksum)
        self._recorder = StatsRecorder(self.scheduler, blocks, adapters, self._audit)
        # The step that the device computes, where the engine is ahead of it.
        self._in_flight: LaunchedStep | None = None

    # The loop

    def step(self) -> bool:
        """Advances every request that can be: plans, runs, commits and emits. False if none can be advanced.

        Where the runner is asynchronous the engine is one step ahead: a step is launched before the tokens of
        the one that runs are there, and gets them on the device. What is committed then is the step before.

        Raises:
            Exception: whatever a step failed with, if the device does not compute any more.
        """
        now_s, failed = time.monotonic(), self._recorder.failed_steps
        launched = self._run(self._plan(now_s), now_s)
        if self._runner.asynchronous:
            due, self._in_flight = self._in_flight, launched
            self._emit_step(self._commit(due))
            self._advance(launched)
        else:
            due = launched
            self._advance(launched)
            self._emit_step(self._commit(due))
        return launched is not None or due is not None or self._recorder.failed_steps > failed

    def _plan(self, now_s: float) -> Schedule:
        """Takes up what has happened beside the loop, and chooses the next step's tokens."""
        self._end_drains(now_s)
        self.adapters.poll()
        self._take_grammars(now_s)
        schedule = self.scheduler.schedule(now_s)
        for sequence, error in schedule.failed:
            self._fail(sequence, error)
        return schedule

    def _run(self, schedule: Schedule, started_s: float) -> LaunchedStep | None:
        """Launches a step; None if no request can be advanced, or the step failed."""
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
        return LaunchedStep(
            launched=launched,
            computed=[Computed(item, item.num_samples, len(item.scores)) for item in scheduled],
            started_s=started_s,
            in_stride=self._in_flight is not None,
            record=begun_record(schedule, plan, planned_s - started_s),
        )

    def _advance(self, step: LaunchedStep | None) -> None:
        """Takes what a launched step computes as computed, and its tokens as there, though not known yet.

        A request that ends with it, or that cannot go on without knowing it, gets no such token: it is not
        scheduled until it is known.
        """
        samples = 0
        for item, num_samples, num_scores in step.computed if step is not None else ():
            sequence = item.sequence
            samples += num_samples
            if sequence.status is Status.FINISHED:
                continue
            sequence.num_computed += item.num_tokens
            sequence.scored_to += num_scores
            if num_samples and self._runner.asynchronous and not self._must_know(item):
                sequence.token_ids.append(0)
                sequence.awaited = samples - 1

    def _commit(self, step: LaunchedStep | None) -> Committed | None:
        """Waits for a launched step and writes what it computed into its sequences; None if it failed."""
        if step is None:
            return None
        try:
            output = step.launched.result()
        except Exception as error:
            self._give_up(step.sequences, error)
            return None
        return self._committer.commit(step, output, time.monotonic())

    def _emit_step(self, committed: Committed | None) -> None:
        """Tells every client what a step has brought, and retires the requests that ended with it."""
        if committed is None:
            return
        for sequence, error in committed.failed:
            self._fail(sequence, error)
        for sequence in committed.finished:
            self._retire(sequence)
        for client, deltas in committed.deltas.items():
            self._emit(client, Tokens(tuple(deltas)))
        self._recorder.add(committed)

    def _give_up(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """Ends the requests of a step that failed; what it wrote lies in blocks that only they had.

        Raises:
            Exception: `error`, if the device does not compute any more.
        """
        if not self._runner.usable():
            raise error
        self._recorder.failed_steps += 1
        lost = [sequence for sequence in sequences if sequence.status is not Status.FINISHED]
        _log.error("a step failed, and with it %s", [one.request.request_id for one in lost], exc_info=error)
        for sequence in lost:
            self._fail(sequence, InternalError(f"the step failed: {error.__class__.__name__}"))

    def _batch_position(self, item: Scheduled) -> tuple[bool, list[int]]:
        """Decodes first, then chunks; within either, one adapter's rows together: fewer, larger tiles."""
        return item.num_tokens > 1, [self.adapters.requests.slot(handle) for handle in item.sequence.handles]

    def _must_know(self, item: Scheduled) -> bool:
        """True if the host has to know a sequence's next token before there can be another."""
        sequence, sampling = item.sequence, item.sequence.request.sampling
        return (
            sequence.is_full(more=1)
            or sampling.penalised
            or bool(sampling.bad_words)
            or sequence.matcher is not None
            or bool(item.drafts)
            or self.scheduler.speculates(sequence, len(sequence.token_ids) + 1)
        )

    # Requests

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None or bool(self._structured.compiling)

    @property
    def _num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._structured.compiling)

    def submit(self, client: str, request: Request) -> None:
        """Queues a request. One that cannot be served is answered with `Failed` at once."""
        try:
            if (client, request.request_id) in self._sequences:
                raise InvalidArgumentError.field("request_id", f"{request.request_id!r} is running already")
            waiting, ahead = self._num_waiting, self._runner.asynchronous
            sequence = self._admission.admit(client, request, num_waiting=waiting, ahead=ahead)
        except ServerError as error:
            self._emit(client, Failed(request.request_id, error.info))
            return
        self._sequences[client, request.request_id] = sequence
        if request.structure is None:
            self.scheduler.add(sequence)
        else:
            self._structured.compile(sequence)

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

    def _take_grammars(self, now_s: float) -> None:
        """Ends the answers that their grammars end; queues the requests whose grammars are compiled."""
        for sequence, end in self._structured.followed():
            if isinstance(end, FinishReason):
                self._emit(sequence.client, Tokens((last_delta(sequence, end, time.monotonic()),)))
                self._retire(sequence)
            else:
                self._fail(sequence, end)
        for sequence, error in self._structured.compiled(now_s):
            if error is None:
                self.scheduler.add(sequence)
            else:
                self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: ServerError) -> None:
        """Ends a request with an error."""
        self._emit(sequence.client, Failed(sequence.request.request_id, error.info))
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Frees all that a sequence holds and forgets it; safe to call twice."""
        if self._structured.drop(sequence):
            sequence.status = Status.FINISHED
        self.scheduler.finish(sequence)
        if self._sequences.pop((sequence.client, sequence.request.request_id), None) is not None:
            self.adapters.requests.release(sequence.handles)
        assert sequence.status is Status.FINISHED

    def unload(self, name: str, grace_s: float | None, done: Callable[[], None]) -> None:
        """As `AdapterStore.unload`; requests that hold the adapter after `grace_s` seconds get CANCELLED.

        None lets them run to their end.
        """
        self._drains.unload(name, grace_s, done)

    def _end_drains(self, now_s: float) -> None:
        """Ends the requests that hold an adapter whose time to drain is over."""
        for name in self._drains.overdue(now_s):
            error = unloaded(name)
            for sequence in list(self._sequences.values()):
                if any(handle.draining and handle.name == name for handle in sequence.handles):
                    self._fail(sequence, error)

    def idle(self) -> bool:
        """Looks after the engine while there is nothing to step; whether there is more to do at once."""
        return self._audit.idle()

    def stats(self) -> Stats:
        """Counts of what happened since the last call, and the state now."""
        return self._recorder.take(len(self._structured.compiling))

    def check_integrity(self) -> IntegrityReport:
        """Compares every pool with its holders, and the weights with their checksum."""
        problems, checksum = self._audit.check_now()
        return IntegrityReport(
            problems=problems,
            running=len(self.scheduler.running),
            waiting=self._num_waiting,
            kv_blocks_used=self._blocks.num_used,
            adapter_references=self.adapters.requests.references(),
            weight_checksum=checksum,
        )

    def _problems(self) -> list[str]:
        held = sum(len(sequence.handles) for sequence in self._sequences.values())
        return pool_problems(self.scheduler, self.adapters, held)
