"""Who computes how many tokens in the next step. Pure Python: no torch, no model, no clock of its own.

There are no prefill and decode phases: a sequence has tokens known and tokens computed, and a step lets
the second catch up with the first under a token budget (the idea of vLLM's v1 scheduler). Whether a
sequence's adapters are on the device is an input to the plan: one that waits for them is passed over,
not waited for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

from loraplex_server.adapters.record import AdapterHandle, Readiness
from loraplex_server.config import SchedulerConfig
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.sequence import Sequence, Status
from loraplex_server.errors import DeadlineExceededError, InternalError, ServerError

AdmissionOrder = Callable[[list[Sequence], float], list[Sequence]]
"""The waiting sequences (in order of arrival) and the time, to the order in which they are admitted.

A pure function: it moves nothing and keeps nothing.
"""


def fifo_within_priority(waiting: list[Sequence], now_s: float) -> list[Sequence]:
    """Higher priority first; within one, first come first served."""
    del now_s
    return sorted(waiting, key=lambda sequence: -sequence.request.priority)


class AdapterReadiness(Protocol):
    """What the scheduler asks of the adapter store. No call blocks."""

    def reserve(self, handles: tuple[AdapterHandle, ...]) -> Readiness:
        """Takes device references to all of `handles` (READY, LOADING) or to none (BLOCKED, FAILED)."""

    def is_ready(self, handles: tuple[AdapterHandle, ...]) -> Readiness:
        """READY once reserved adapters are all on the device; LOADING until then, FAILED if one cannot be."""

    def unreserve(self, handles: tuple[AdapterHandle, ...]) -> None:
        """Gives the device references back."""

    def failure(self, handles: tuple[AdapterHandle, ...]) -> ServerError | None:
        """Why the last answer for `handles` was FAILED."""


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """`num_tokens` of `sequence` are computed, from `sequence.num_computed` on."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next one is sampled."""
        return self.num_tokens == self.sequence.num_pending


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One step's choice.

    Attributes:
        failed: sequences that will never run, with the reason; they hold nothing any more.
    """

    scheduled: tuple[Scheduled, ...]
    failed: tuple[tuple[Sequence, ServerError], ...]
    preemptions: int


class Scheduler:
    """Owns the waiting and the running sequences, and their KV blocks and device references.

    Attributes:
        prefix_queries: tokens of all prompts that were looked up in the prefix cache.
        prefix_hits: how many of them were there.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: KvBlockPool,
        adapters: AdapterReadiness,
        order: AdmissionOrder = fifo_within_priority,
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._adapters = adapters
        self._order = order
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_waiting_for_adapter(self) -> int:
        return sum(sequence.adapter_wait_start_s is not None for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees all that it holds. Harmless if it is out."""
        if sequence.status is Status.FINISHED:
            return
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._free_blocks(sequence)
        self._unreserve(sequence)
        sequence.status = Status.FINISHED

    def schedule(self, now_s: float | None = None) -> Schedule:
        """Chooses the next step's tokens; moves sequences between the queues and takes their blocks.

        Args:
            now_s: `time.monotonic()`, given by tests.
        """
        now_s = time.monotonic() if now_s is None else now_s
        failed = self._expire()
        scheduled, preempted = self._continue_running()
        # What memory took away is not given to newcomers in the same step.
        if not preempted:
            used = sum(item.num_tokens for item in scheduled)
            self._admit(scheduled, failed, self._config.max_batch_tokens - used, now_s)
        return Schedule(tuple(scheduled), tuple(failed), preempted)

    def _expire(self) -> list[tuple[Sequence, ServerError]]:
        wall_s = time.time()
        late = [
            sequence
            for sequence in (*self.running, *self.waiting)
            if sequence.request.deadline_s is not None and sequence.request.deadline_s <= wall_s
        ]
        failed: list[tuple[Sequence, ServerError]] = []
        for sequence in late:
            self.finish(sequence)
            failed.append(
                (sequence, DeadlineExceededError("the deadline passed before the answer was complete"))
            )
        return failed

    def _continue_running(self) -> tuple[list[Scheduled], int]:
        budget = self._config.max_batch_tokens
        scheduled: dict[Sequence, int] = {}
        preempted = 0
        # Decodes first: a long prefill must not hold them back.
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_pending > 1):
            if sequence.status is not Status.RUNNING:
                continue
            num_tokens = min(sequence.num_pending, budget)
            while num_tokens and not self._grow(sequence, num_tokens):
                victim = self._order(list(self.running), 0.0)[-1]
                budget += scheduled.pop(victim, 0)
                self._preempt(victim)
                preempted += 1
                if victim is sequence:
                    num_tokens = 0
            if num_tokens:
                scheduled[sequence] = num_tokens
                budget -= num_tokens
        return [Scheduled(sequence, num_tokens) for sequence, num_tokens in scheduled.items()], preempted

    def _admit(
        self,
        scheduled: list[Scheduled],
        failed: list[tuple[Sequence, ServerError]],
        budget: int,
        now_s: float,
    ) -> None:
        # Handles are a request's own; what is blocked for one request is so for all that name the same.
        blocked: set[tuple[str, ...]] = set()
        urgent = False
        for sequence in self._order(self.waiting, now_s):
            if budget <= 0 or len(self.running) >= self._config.max_num_requests:
                break
            names = tuple(handle.name for handle in sequence.handles)
            if names and not sequence.reserved and (urgent or names in blocked):
                self._note_wait(sequence, now_s)
                continue
            match self._readiness(sequence):
                case Readiness.FAILED:
                    error = self._adapters.failure(sequence.handles) or InternalError("no reason was given")
                    self.finish(sequence)
                    failed.append((sequence, error))
                    continue
                case Readiness.LOADING:
                    self._note_wait(sequence, now_s)
                    continue
                case Readiness.BLOCKED:
                    self._note_wait(sequence, now_s)
                    blocked.add(names)
                    started_s = sequence.adapter_wait_start_s
                    assert started_s is not None
                    urgent = urgent or now_s - started_s > self._config.max_adapter_wait_s
                    continue
                case Readiness.READY:
                    pass
            # The blocks of all its known tokens are taken now: a prompt that is computed in chunks must
            # not lose its later blocks to those admitted after it.
            if not self._take_blocks(sequence):
                break
            num_tokens = min(sequence.num_pending, budget)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.status = Status.RUNNING
            self._end_wait(sequence, now_s)
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
            scheduled.append(Scheduled(sequence, num_tokens))
            budget -= num_tokens

    def _readiness(self, sequence: Sequence) -> Readiness:
        if not sequence.handles:
            return Readiness.READY
        if sequence.reserved:
            readiness = self._adapters.is_ready(sequence.handles)
        else:
            readiness = self._adapters.reserve(sequence.handles)
            sequence.reserved = readiness in (Readiness.READY, Readiness.LOADING)
        return readiness

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all known tokens of a sequence without any; False, and none taken, if too few are free.

        What is cached of the tokens' beginning is taken from there, and counts as computed.
        """
        sequence.block_table = self._blocks.take_cached(sequence.reusable_keys(self._blocks.block_size))
        sequence.num_named = len(sequence.block_table)
        sequence.num_computed = sequence.num_named * self._blocks.block_size
        if not self._grow(sequence, sequence.num_pending):
            self._free_blocks(sequence)
            sequence.num_computed = 0
            return False
        if sequence.caches and sequence.first_scheduled_s is None:
            sequence.cached_prompt_tokens = max(0, sequence.num_computed - sequence.num_virtual)
            self.prefix_queries += sequence.num_prompt - sequence.num_virtual
            self.prefix_hits += sequence.cached_prompt_tokens
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Takes the blocks that `num_tokens` more computed tokens need; False if too few are free."""
        needed = self._blocks.blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_table)
        if needed > self._blocks.num_free:
            return False
        if needed > 0:
            sequence.block_table += self._blocks.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue: its blocks are given back, and what does not stay cached is computed anew later.

        It keeps its adapters: it is among the next to run, and holding them blocks no one for ever,
        since whoever has its blocks runs to the end.
        """
        self.running.remove(sequence)
        self._free_blocks(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        sequence.status = Status.WAITING
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda sequence: sequence.arrival_s)

    def _free_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_named = 0

    def _unreserve(self, sequence: Sequence) -> None:
        if sequence.reserved:
            self._adapters.unreserve(sequence.handles)
            sequence.reserved = False

    @staticmethod
    def _note_wait(sequence: Sequence, now_s: float) -> None:
        if sequence.adapter_wait_start_s is None:
            sequence.adapter_wait_start_s = now_s

    @staticmethod
    def _end_wait(sequence: Sequence, now_s: float) -> None:
        if sequence.adapter_wait_start_s is not None:
            sequence.adapter_wait_s += now_s - sequence.adapter_wait_start_s
            sequence.adapter_wait_start_s = None

    def check_integrity(self) -> list[str]:
        """A line for each broken invariant of queues and blocks."""
        problems = self._blocks.check_integrity(
            sequence.block_table for sequence in (*self.running, *self.waiting)
        )
        problems += [
            f"request {sequence.request.request_id} is {sequence.status.value} in the {where} queue"
            for where, status, queue in (
                ("running", Status.RUNNING, self.running),
                ("waiting", Status.WAITING, self.waiting),
            )
            for sequence in queue
            if sequence.status is not status
        ]
        problems += [
            f"request {sequence.request.request_id} runs without its adapters"
            for sequence in self.running
            if sequence.handles and not sequence.reserved
        ]
        return problems
