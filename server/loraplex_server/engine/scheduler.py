"""The choice of sequences and tokens for the next step. Pure Python: no torch, no model.

There are no prefill and decode phases: a sequence has tokens known and tokens computed, and a step lets
the second catch up with the first under a token budget (the idea of vLLM's v1 scheduler). Whether a
sequence's adapters are on the device is an input to the plan: one that waits for them is passed over,
not waited for.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

from loraplex_server.adapters.residency.record import Readiness
from loraplex_server.config import SchedulerConfig
from loraplex_server.core.errors import DeadlineExceededError, InternalError
from loraplex_server.engine.accounts import Account
from loraplex_server.engine.adapter_room import MAX_BLOCKED, AdapterReadiness, AdapterRoom, KeptRoom
from loraplex_server.engine.fairness import DeficitRoundRobin, Ledger
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.schedule import FailedSequence, Schedule, Scheduled
from loraplex_server.engine.sequence import Sequence, Status

AdmissionOrder = Callable[[list[Sequence], float, Container[Account]], Iterable[Sequence]]
"""The waiting sequences (in order of arrival), the time, and the flows that are passed over, to the order in
which they are admitted.

A pure function: it moves nothing and keeps nothing. Flows may come to those passed over while the result is
iterated; it need not offer their requests any more.
"""

_MAX_READ_TOKENS = 1024
"""Tokens that are looked at in one step to draft others from them: about a millisecond."""


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
        order: AdmissionOrder | None = None,
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._room = AdapterRoom(adapters, config.max_adapter_wait_s)
        rounds = DeficitRoundRobin(config.fair_quantum, config.fair_aging_s)
        self._order = order or rounds
        self._ledger = Ledger(rounds)
        self._groups: dict[tuple[str, str], _Group] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_waiting_for_adapter(self) -> int:
        return sum(sequence.flow is not None and sequence.flow.awaits_adapters for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue."""
        self.waiting.append(sequence)
        self._ledger.enter(sequence)
        if sequence.group is not None:
            self._groups.setdefault(sequence.group, _Group()).count += 1

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees all that it holds. Harmless if it is out."""
        if sequence.status is Status.FINISHED:
            return
        running = sequence.status is Status.RUNNING
        (self.running if running else self.waiting).remove(sequence)
        self._ledger.leave(sequence, waiting=not running)
        self._free_blocks(sequence)
        self._room.give_back(sequence)
        self._leave_group(sequence)
        sequence.status = Status.FINISHED

    def name_blocks(self, sequence: Sequence) -> None:
        """Tells the pool what is in the blocks that became full, for others to find."""
        for block, key in sequence.new_block_keys(self._blocks.block_size):
            self._blocks.set_key(block, key)
            if sequence.group is not None:
                self._groups[sequence.group].keys.append(key)

    def schedule(self, now_s: float | None = None) -> Schedule:
        """Chooses the next step's tokens; moves sequences between the queues and takes their blocks.

        Args:
            now_s: `time.monotonic()`, given by tests.
        """
        now_s = time.monotonic() if now_s is None else now_s
        failed = self._expire()
        scheduled, preempted, scores = self._continue_running()
        # What memory took away is not given to newcomers in the same step.
        if not preempted:
            used = sum(item.num_tokens for item in scheduled)
            self._admit(scheduled, failed, self._config.max_batch_tokens - used, scores, now_s)
            scheduled = self._with_drafts(scheduled)
        for item in scheduled:
            self._ledger.charge(item.sequence, item.num_rows)
        return Schedule(tuple(scheduled), tuple(failed), preempted)

    def _expire(self) -> list[FailedSequence]:
        wall_s = time.time()
        late = [
            sequence
            for sequence in (*self.running, *self.waiting)
            if sequence.request.deadline_s is not None and sequence.request.deadline_s <= wall_s
        ]
        for sequence in late:
            self.finish(sequence)
        error = DeadlineExceededError("the deadline passed before the answer was complete")
        return [FailedSequence(sequence, error) for sequence in late]

    def _continue_running(self) -> _Continued:
        """Gives the running sequences their tokens; preempts some if memory is short."""
        budget, scores = self._config.max_batch_tokens, self._config.max_scored_tokens
        scheduled: dict[Sequence, int] = {}
        preempted = 0
        # Decodes first: a long prefill must not hold them back.
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_pending > 1):
            if sequence.status is not Status.RUNNING or sequence.held_back:
                continue
            scored = sequence.num_unscored > 0
            num_tokens = min(sequence.most_tokens(scores) if scored else sequence.num_pending, budget)
            while num_tokens and not self._grow(sequence, num_tokens):
                victim = min(self.running, key=lambda one: (one.request.priority, -one.arrival_s))
                given = scheduled.pop(victim, 0)
                budget, scores = budget + given, scores + len(victim.scored_in(given))
                self._preempt(victim)
                preempted += 1
                if victim is sequence:
                    num_tokens = 0
            if num_tokens:
                scheduled[sequence] = num_tokens
                budget -= num_tokens
                if scored:
                    scores -= len(sequence.scored_in(num_tokens))
        found = [Scheduled(sequence, num_tokens) for sequence, num_tokens in scheduled.items()]
        return _Continued(found, preempted, scores)

    def _admit(
        self,
        scheduled: list[Scheduled],
        failed: list[FailedSequence],
        budget: int,
        scores: int,
        now_s: float,
    ) -> None:
        filling = [one for one in self.running if one.caches and one.num_pending > 1]
        admission = _Admission(scheduled, failed, filling, budget, scores, now_s)
        if self._full(admission):
            return
        passed = admission.passed
        candidates = self.waiting
        if impatient := self._room.impatient(candidates, now_s):
            self._offer(impatient, admission)
            admission.kept = self._room.keep_for(impatient, now_s)
            candidates = [one for one in self.waiting if admission.kept.leaves(one)]
        if not self._offer(self._order(candidates, now_s, passed), admission):
            there = [one for one in self.waiting if admission.kept.leaves(one, resident=True)]
            self._offer(self._order(there, now_s, passed), admission)

    def speculates(self, sequence: Sequence, length: int) -> bool:
        """True if tokens may be drafted for a sequence of `length` tokens, at the present load."""
        drafter = sequence.drafter
        return drafter is not None and drafter.due(length) and self._has_room_for_drafts()

    def _has_room_for_drafts(self) -> bool:
        config = self._config
        return len(self.running) <= config.speculation_max_load * config.max_num_requests

    def _with_drafts(self, scheduled: list[Scheduled]) -> list[Scheduled]:
        """Adds draft tokens to those that decode, from what is left of the step.

        Nobody waits for drafts, and nobody is preempted for them.
        """
        if not any(item.sequence.drafter for item in scheduled):
            return scheduled
        config = self._config
        rows = config.max_batch_tokens - sum(item.num_tokens for item in scheduled)
        # As many rows are sampled as there could be without drafts: so much memory was set aside.
        rows = min(rows, config.max_samples - sum(item.num_samples for item in scheduled))
        found, reading, open_ = [], _MAX_READ_TOKENS, self._has_room_for_drafts()
        for left, item in zip(range(len(scheduled), 0, -1), scheduled, strict=True):
            sequence, drafter = item.sequence, item.sequence.drafter
            if drafter is not None and sequence.awaited is None:
                reading -= drafter.read(sequence.token_ids, reading)
                if open_ and rows > 0 and item.num_tokens == 1 and item.samples:
                    drafts = drafter.propose(sequence.token_ids, -(-rows // left))
                    if drafts and self._grow(sequence, 1 + len(drafts)):
                        rows -= len(drafts)
                        item = dataclasses.replace(item, drafts=drafts)
            found.append(item)
        return found

    def give_back(self, sequence: Sequence) -> None:
        """Frees the blocks of a running sequence that only rejected drafts have used."""
        kept = self._blocks.blocks_for(len(sequence.token_ids))
        self._blocks.release(sequence.block_table[kept:])
        del sequence.block_table[kept:]

    def _full(self, admission: _Admission) -> bool:
        # Who waits for blocks that are coming has a place already.
        places = self._config.max_num_requests - admission.num_coming
        return admission.budget <= 0 or len(self.running) >= places

    def _offer(self, ordered: Iterable[Sequence], admission: _Admission) -> bool:
        """Admits those that can run. False if so many found no room on the device that only those who need
        none are left to try."""
        passed, now_s = admission.passed, admission.now_s
        for sequence in ordered:
            if self._full(admission):
                break
            flow = sequence.flow
            assert flow is not None
            if flow in passed or sequence.held_back:
                continue
            match self._room.ask(sequence, now_s):
                case Readiness.FAILED:
                    error = self._room.failure(sequence) or InternalError("no reason was given")
                    self.finish(sequence)
                    admission.failed.append(FailedSequence(sequence, error))
                    continue
                case Readiness.LOADING:
                    self._room.note_wait(sequence, now_s)
                    passed.add(flow)
                    continue
                case Readiness.BLOCKED:
                    self._room.note_wait(sequence, now_s)
                    passed.add(flow)
                    admission.num_blocked += 1
                    if admission.num_blocked >= MAX_BLOCKED:
                        return False
                    continue
                case Readiness.READY:
                    pass
            if sequence.num_unscored and not admission.scores:
                passed.add(flow)
                continue
            # The blocks of all its known tokens are taken now: a prompt that is computed in chunks must
            # not lose its later blocks to those admitted after it.
            if self._is_coming(sequence, admission.filling):
                admission.num_coming += 1
                continue
            if not self._take_blocks(sequence):
                break
            num_copied = max(0, sequence.num_prefix - sequence.num_computed)
            sequence.num_computed += num_copied
            num_tokens = min(sequence.most_tokens(admission.scores), admission.budget)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.status = Status.RUNNING
            self._ledger.admit(sequence, now_s)
            self._room.end_wait(sequence, now_s)
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
            admission.scheduled.append(Scheduled(sequence, num_tokens, num_copied))
            if sequence.caches and sequence.num_pending > 1:
                admission.filling.append(sequence)
            admission.budget -= num_tokens
            admission.scores -= len(sequence.scored_in(num_tokens))
        return True

    def _is_coming(self, sequence: Sequence, filling: list[Sequence]) -> bool:
        """True if one of `filling` is about to compute the first block that a sequence misses in the cache.

        It then waits for that instead of computing the same beside it. Whoever runs goes on or gives its
        place up, so nobody waits for ever.
        """
        if not filling:
            return False
        size = self._blocks.block_size
        for index, key in enumerate(sequence.reusable_keys(size)):
            if not self._blocks.has(key):
                return any(one.will_fill(index, key, size) for one in filling)
        return False

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
        if sequence.caches and sequence.first_scheduled_s is None and not sequence.num_unscored:
            sequence.cached_prompt_tokens = max(0, sequence.num_computed - sequence.num_virtual)
            if sequence.group is not None:
                return True
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
        self._ledger.wait(sequence)
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda sequence: sequence.arrival_s)

    def _free_blocks(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_named = 0

    def _leave_group(self, sequence: Sequence) -> None:
        if sequence.group is None:
            return
        group = self._groups[sequence.group]
        group.count -= 1
        if not group.count:
            self._blocks.forget(group.keys)
            del self._groups[sequence.group]

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
        problems += self._ledger.check_integrity(self.waiting, self.running)
        members = Counter(sequence.group for sequence in (*self.running, *self.waiting) if sequence.group)
        if members != {key: group.count for key, group in self._groups.items()}:
            problems.append("groups count other members than there are")
        problems += [
            f"request {sequence.request.request_id} runs without its adapters"
            for sequence in self.running
            if sequence.handles and not sequence.reserved
        ]
        return problems


class _Continued(NamedTuple):
    """Work of the running sequences in one step.

    Attributes:
        scores: tokens that may still be scored.
    """

    scheduled: list[Scheduled]
    preempted: int
    scores: int


@dataclasses.dataclass
class _Group:
    """Requests with one prompt, apart from the prefix cache.

    Attributes:
        count: members in the queues.
        keys: of the blocks that one of them has filled.
    """

    count: int = 0
    keys: list[bytes] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Admission:
    """One step's admission so far.

    Attributes:
        filling: sequences that run and compute blocks for the prefix cache.
        budget: tokens that may still be computed.
        scores: how many of them may be scored.
        passed: flows whose next request has to wait.
        num_coming: sequences that wait for blocks which those in `filling` are about to compute.
        num_blocked: sequences whose adapters found no room on the device.
        kept: room on the device that is kept for those who have waited long.
    """

    scheduled: list[Scheduled]
    failed: list[FailedSequence]
    filling: list[Sequence]
    budget: int
    scores: int
    now_s: float
    passed: set[Account] = dataclasses.field(default_factory=set)
    num_blocked: int = 0
    num_coming: int = 0
    kept: KeptRoom = dataclasses.field(default_factory=KeptRoom)
