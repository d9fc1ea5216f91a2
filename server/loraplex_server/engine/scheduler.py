"""Who computes how many tokens in the next step. Pure Python: no torch, no model, no clock of its own.

There are no prefill and decode phases: a sequence has tokens known and tokens computed, and a step lets
the second catch up with the first under a token budget (the idea of vLLM's v1 scheduler). Whether a
sequence's adapters are on the device is an input to the plan: one that waits for them is passed over,
not waited for.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable
from typing import Protocol

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.config import SchedulerConfig
from loraplex_server.core.errors import DeadlineExceededError, InternalError, ServerError
from loraplex_server.engine.fairness import Account, DeficitRoundRobin, Ledger
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.sequence import Sequence, Status

AdmissionOrder = Callable[[list[Sequence], float, Container[Account]], Iterable[Sequence]]
"""The waiting sequences (in order of arrival), the time, and the flows that are passed over, to the order in
which they are admitted.

A pure function: it moves nothing and keeps nothing. Flows may come to those passed over while the result is
iterated; it need not offer their requests any more.
"""

_MOST_READ = 1024
"""Tokens that are looked at in one step, to guess others from them: about a millisecond."""

_MAX_BLOCKED = 8
"""Requests without room for their adapters in one step, behind which nobody gets an adapter swapped in."""

_ALONE_AFTER = 8
"""Waiting for so many times its patience, a request is the only one to get room."""

_DOUBLE_AFTER = 4
"""After every so many times its patience, twice as many adapters are freed for a request that needs room."""

_MAX_DOUBLINGS = 16

_VAIN_AFTER = 8
"""An adapter that gets no new requests for so long and is not idle yet is left alone before others."""


def fifo_within_priority(
    waiting: list[Sequence], now_s: float, passed: Container[Account] = ()
) -> list[Sequence]:
    """Higher priority first; within one, first come first served."""
    del now_s, passed
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
    """`num_tokens` of `sequence` are computed, from `sequence.num_computed` on.

    Attributes:
        num_copied: virtual tokens before these whose keys and values are first copied from the adapter.
        drafts: guessed tokens computed after them; a token is sampled after each of these, too.
    """

    sequence: Sequence
    num_tokens: int
    num_copied: int = 0
    drafts: tuple[int, ...] = ()

    @property
    def scores(self) -> range:
        """Positions of the chunk whose following token is scored."""
        return self.sequence.scored_in(self.num_tokens) if self.sequence.num_unscored else range(0)

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next one is sampled."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def num_samples(self) -> int:
        """Rows of it after which a token is sampled."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def num_rows(self) -> int:
        """Tokens that are computed, drafts included."""
        return self.num_tokens + len(self.drafts)


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
        order: AdmissionOrder | None = None,
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._adapters = adapters
        rounds = DeficitRoundRobin(config.fair_quantum, config.fair_aging_s)
        self._order = order or rounds
        self._ledger = Ledger(rounds)
        self._holds: dict[str, _Hold] = {}
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
        self._unreserve(sequence)
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

    def _continue_running(self) -> tuple[list[Scheduled], int, int]:
        """What the running sequences compute, how many were preempted, and how many more may be scored."""
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
        return found, preempted, scores

    def _admit(
        self,
        scheduled: list[Scheduled],
        failed: list[tuple[Sequence, ServerError]],
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
        if urgent := self._urgent(now_s):
            self._offer(urgent, admission)
            self._make_room([one for one in urgent if not one.reserved], admission)
            candidates = [one for one in candidates if admission.may_join(one)]
        if not self._offer(self._order(candidates, now_s, passed), admission):
            there = [one for one in self.waiting if admission.may_join(one, resident=True)]
            self._offer(self._order(there, now_s, passed), admission)

    def speculates(self, sequence: Sequence, length: int) -> bool:
        """Whether there may be a guess for a sequence once it has `length` tokens, as busy as it is now."""
        drafter = sequence.drafter
        return drafter is not None and drafter.due(length) and self._has_room_for_drafts()

    def _has_room_for_drafts(self) -> bool:
        config = self._config
        return len(self.running) <= config.speculation_max_load * config.max_num_requests

    def _with_drafts(self, scheduled: list[Scheduled]) -> list[Scheduled]:
        """Guesses for those that decode, from what is left of the step: no one waits for them, and no one is
        preempted.
        """
        if not any(item.sequence.drafter for item in scheduled):
            return scheduled
        config = self._config
        rows = config.max_batch_tokens - sum(item.num_tokens for item in scheduled)
        # As many rows are sampled as there could be without guesses: so much memory was set aside.
        rows = min(rows, config.max_samples - sum(item.num_samples for item in scheduled))
        found, reading, open_ = [], _MOST_READ, self._has_room_for_drafts()
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
        """Frees the blocks of a running sequence that only wrong guesses have used."""
        kept = self._blocks.blocks_for(len(sequence.token_ids))
        self._blocks.release(sequence.block_table[kept:])
        del sequence.block_table[kept:]

    def _urgent(self, now_s: float) -> list[Sequence]:
        """Those who have waited for room on the device beyond their patience; a few, the longest first.

        One who has waited for a multiple of it stands alone: who needs much room must not have it taken away
        piece by piece.
        """
        patience_s = self._config.max_adapter_wait_s
        waits = [
            (-sequence.request.priority, sequence.adapter_wait_start_s, number)
            for number, sequence in enumerate(self.waiting)
            if sequence.adapter_wait_start_s is not None
            and now_s - sequence.adapter_wait_start_s > patience_s
            and not sequence.reserved
        ]
        if not waits:
            return []
        alone = now_s - min(waits)[1] > _ALONE_AFTER * patience_s > 0
        return [self.waiting[number] for *_, number in heapq.nsmallest(1 if alone else _MAX_BLOCKED, waits)]

    def _full(self, admission: _Admission) -> bool:
        # Who waits for blocks that are coming has a place already.
        places = self._config.max_num_requests - admission.num_coming
        return admission.budget <= 0 or len(self.running) >= places

    def _offer(self, ordered: Iterable[Sequence], admission: _Admission) -> bool:
        """Admits those that can run. False if so many found no room on the device that only those are left
        who need none."""
        passed, now_s = admission.passed, admission.now_s
        for sequence in ordered:
            if self._full(admission):
                break
            flow = sequence.flow
            assert flow is not None
            if flow in passed or sequence.held_back:
                continue
            match self._readiness(sequence, now_s):
                case Readiness.FAILED:
                    error = self._adapters.failure(sequence.handles) or InternalError("no reason was given")
                    self.finish(sequence)
                    admission.failed.append((sequence, error))
                    continue
                case Readiness.LOADING:
                    self._note_wait(sequence, now_s)
                    passed.add(flow)
                    continue
                case Readiness.BLOCKED:
                    self._note_wait(sequence, now_s)
                    passed.add(flow)
                    admission.num_blocked += 1
                    if admission.num_blocked >= _MAX_BLOCKED:
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
            self._end_wait(sequence, now_s)
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
            admission.scheduled.append(Scheduled(sequence, num_tokens, num_copied))
            if sequence.caches and sequence.num_pending > 1:
                admission.filling.append(sequence)
            admission.budget -= num_tokens
            admission.scores -= len(sequence.scored_in(num_tokens))
        return True

    def _make_room(self, urgent: list[Sequence], admission: _Admission) -> None:
        """Sees to it that those without room on the device get some.

        Until its patience has run out, a request waits for an adapter that falls idle by itself. Then an
        adapter in use gets no new requests, for each that waits one at first, and the longer it waits, the
        more; room that is idle is left to them. Adapters go in and out by turns of at least that patience,
        so that each swap serves all who wait for it.
        """
        if not urgent:
            return
        patience_s, now_s = self._config.max_adapter_wait_s, admission.now_s
        count = 0
        for one in urgent:
            assert one.adapter_wait_start_s is not None
            beyond_s = now_s - one.adapter_wait_start_s - patience_s
            doublings = int(beyond_s / (_DOUBLE_AFTER * patience_s)) if patience_s > 0 else _MAX_DOUBLINGS
            count += 1 << min(doublings, _MAX_DOUBLINGS)
        due = [hold for hold in self._holds.values() if now_s - hold.since_s >= patience_s]
        # Those that the fewest requests hold are idle soonest, but for those where that was tried in vain.
        vain_s = _VAIN_AFTER * patience_s
        due.sort(key=lambda hold: (hold.drained_longer_than(vain_s, now_s), hold.count))
        for hold in due[:count]:
            hold.drained_s = now_s if hold.drained_s is None else hold.drained_s
        drained = {hold.name for hold in due[:count]}
        admission.open_adapters = self._holds.keys() - drained
        admission.priority = max(one.request.priority for one in urgent)

    def _readiness(self, sequence: Sequence, now_s: float) -> Readiness:
        if not sequence.handles:
            return Readiness.READY
        if sequence.reserved:
            readiness = self._adapters.is_ready(sequence.handles)
        else:
            readiness = self._adapters.reserve(sequence.handles)
            sequence.reserved = readiness in (Readiness.READY, Readiness.LOADING)
            if sequence.reserved:
                self._hold(sequence, now_s)
        return readiness

    def _is_coming(self, sequence: Sequence, filling: list[Sequence]) -> bool:
        """Whether one of `filling` is about to compute the first block that a sequence misses in the cache.

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

    def _unreserve(self, sequence: Sequence) -> None:
        if sequence.reserved:
            self._adapters.unreserve(sequence.handles)
            sequence.reserved = False
            for handle in sequence.handles:
                hold = self._holds[handle.name]
                hold.count -= 1
                if not hold.count:
                    del self._holds[handle.name]

    def _hold(self, sequence: Sequence, now_s: float) -> None:
        for handle in sequence.handles:
            self._holds.setdefault(handle.name, _Hold(handle.name, now_s)).count += 1

    @staticmethod
    def _note_wait(sequence: Sequence, now_s: float) -> None:
        flow = sequence.flow
        assert flow is not None
        if sequence.adapter_wait_start_s is None:
            sequence.adapter_wait_start_s = now_s
        if not flow.awaits_adapters:
            flow.wait_from_s, flow.wait_until_s = now_s, None

    @staticmethod
    def _end_wait(sequence: Sequence, now_s: float) -> None:
        flow = sequence.flow
        assert flow is not None
        if flow.awaits_adapters:
            flow.wait_until_s = now_s
        from_s, until_s = sequence.adapter_wait_start_s, now_s
        if from_s is None and sequence.first_scheduled_s is None and flow.wait_from_s is not None:
            # It stood behind the one that the wait was noted for.
            from_s, until_s = max(flow.wait_from_s, sequence.arrival_s), flow.wait_until_s or now_s
        if from_s is not None:
            sequence.adapter_wait_s += max(0.0, until_s - from_s)
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
class _Hold:
    """An adapter in use.

    Attributes:
        count: requests that run with it, or wait with its room set aside.
        since_s: when the first of them got it; it was in use ever since.
        drained_s: when it was first refused to others, to fall idle.
    """

    name: str
    since_s: float
    count: int = 0
    drained_s: float | None = None

    def drained_longer_than(self, seconds: float, now_s: float) -> bool:
        return self.drained_s is not None and now_s - self.drained_s > seconds


class _Admission:
    """One step's admission so far.

    Attributes:
        filling: sequences that run and compute blocks for the prefix cache.
        budget: tokens that may still be computed.
        scores: how many of them may be scored.
        passed: flows whose next request has to wait.
        num_coming: sequences that wait for blocks which those are about to compute.
        num_blocked: how many there was no room on the device for.
        open_adapters: those that may get more requests; None for all.
        priority: of those that room is kept for; higher ones are not concerned.
    """

    def __init__(
        self,
        scheduled: list[Scheduled],
        failed: list[tuple[Sequence, ServerError]],
        filling: list[Sequence],
        budget: int,
        scores: int,
        now_s: float,
    ) -> None:
        self.scheduled = scheduled
        self.failed = failed
        self.filling = filling
        self.budget = budget
        self.scores = scores
        self.now_s = now_s
        self.passed: set[Account] = set()
        self.num_blocked = 0
        self.num_coming = 0
        self.open_adapters: Collection[str] | None = None
        self.priority = 0

    def may_join(self, sequence: Sequence, *, resident: bool = False) -> bool:
        """Whether a sequence takes no room from those that it is kept for; `resident`: and needs none."""
        handles = sequence.handles
        if not handles or sequence.reserved:
            return True
        # One at a time: thousands may wait.
        names = self.open_adapters
        if names is None or sequence.request.priority > self.priority:
            if not resident:
                return True
            names = None
        for handle in handles:
            if not handle.resident or (names is not None and handle.name not in names):
                return False
        return True
