"""The scheduler alone: budgets, chunks, preemption, priorities, and adapters that are not there yet."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as Seq
from typing import Any, cast

import pytest

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.config import SchedulerConfig
from loraplex_server.core.errors import DeadlineExceededError, NotFoundError, ServerError
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.schedule import Schedule
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, Status


class Handle:
    num_virtual_tokens = 0
    num_prefix_tokens = 0
    invocation_tokens: tuple[int, ...] = ()
    """A request's reference to an adapter, as far as the scheduler looks at it."""

    content_hash = "hash"
    resident = False

    def __init__(self, name: str) -> None:
        self.name = name


class Cache:
    """Readiness by rule: `slots` adapters at once; one is on the device from the second question on."""

    def __init__(self, slots: int = 8) -> None:
        self.slots = slots
        self.references: dict[str, int] = {}
        self.arrived: set[str] = set()
        self.broken: set[str] = set()

    def reserve(self, handles: Seq[Any]) -> Readiness:
        names = {handle.name for handle in handles}
        if names & self.broken:
            return Readiness.FAILED
        held = {name for name, count in self.references.items() if count}
        if len(held | names) > self.slots:
            return Readiness.BLOCKED
        self.arrived &= held | names
        for name in names:
            self.references[name] = self.references.get(name, 0) + 1
        return self.is_ready(handles)

    def is_ready(self, handles: Seq[Any]) -> Readiness:
        names = {handle.name for handle in handles}
        ready = names <= self.arrived
        self.arrived |= names
        return Readiness.READY if ready else Readiness.LOADING

    def unreserve(self, handles: Seq[Any]) -> None:
        for handle in handles:
            self.references[handle.name] -= 1

    def device_references(self, name: str) -> int:
        return self.references.get(name, 0)

    def failure(self, handles: Seq[Any]) -> ServerError:
        return NotFoundError("it is broken")


def make(
    *, blocks: int = 64, block_size: int = 4, cache: Cache | None = None, **config: Any
) -> tuple[Scheduler, KvBlockPool]:
    pool = KvBlockPool(blocks, block_size)
    settings = {"max_batch_tokens": 16, "max_num_requests": 8, **config}
    return Scheduler(SchedulerConfig(**settings), pool, cast(Any, cache or Cache())), pool


_ids = iter(range(10**9))


def sequence(
    prompt: int,
    adapters: Seq[str] = (),
    *,
    max_tokens: int = 4,
    priority: int = 0,
    deadline_s: float | None = None,
    arrival_s: float | None = None,
) -> Sequence:
    request = Request(
        f"r{next(_ids)}",
        tuple(range(prompt)),
        SamplingParams(max_tokens=max_tokens),
        tuple(AdapterUse(name) for name in adapters),
        priority=priority,
        deadline_s=deadline_s,
    )
    handles = tuple(cast(AdapterHandle, Handle(name)) for name in adapters)
    found = Sequence(request, "client", handles)
    if arrival_s is not None:
        found.arrival_s = arrival_s
    return found


def commit(scheduler: Scheduler, schedule: Schedule) -> None:
    """Commits a step as the engine does, with token 0 for every sample."""
    for item in schedule.scheduled:
        samples = item.samples
        item.sequence.num_computed += item.num_tokens
        if samples:
            item.sequence.token_ids.append(0)
            if item.sequence.num_generated >= item.sequence.request.sampling.max_tokens:
                scheduler.finish(item.sequence)


def tokens(schedule: Schedule) -> list[int]:
    return [item.num_tokens for item in schedule.scheduled]


def test_prefill_is_chunked_under_the_budget_beside_decodes() -> None:
    scheduler, _ = make(max_batch_tokens=10)
    short, long = sequence(4), sequence(25)
    scheduler.add(short)
    scheduler.add(long)
    chunks = []
    while scheduler.has_work:
        schedule = scheduler.schedule()
        assert sum(tokens(schedule)) <= 10
        chunks.append(tokens(schedule))
        commit(scheduler, schedule)
    # The short prompt whole, then its decodes, each beside as much of the long prompt as fits.
    assert chunks[:4] == [[4, 6], [1, 9], [1, 9], [1, 1]]
    assert scheduler.check_integrity() == []


def test_decodes_go_before_a_long_prefill_that_was_admitted_earlier() -> None:
    scheduler, _ = make(max_batch_tokens=8)
    long = sequence(40)
    scheduler.add(long)
    commit(scheduler, scheduler.schedule())
    short = sequence(2, max_tokens=9)
    short.num_computed, short.status = 2, Status.RUNNING
    short.block_table = scheduler._blocks.allocate(1)
    short.token_ids.append(0)
    scheduler.running.append(short)
    scheduler._ledger.enter(short)
    scheduler._ledger.admit(short, 0.0)
    schedule = scheduler.schedule()
    assert [(item.sequence is short, item.num_tokens) for item in schedule.scheduled] == [
        (True, 1),
        (False, 7),
    ]


def test_no_more_run_than_allowed() -> None:
    scheduler, _ = make(max_num_requests=2)
    for _ in range(3):
        scheduler.add(sequence(2))
    assert len(scheduler.schedule().scheduled) == 2
    assert len(scheduler.waiting) == 1


def test_priority_first_then_arrival() -> None:
    scheduler, _ = make(max_num_requests=3)
    first, second, urgent = sequence(2), sequence(2), sequence(2, priority=5)
    for one in (first, second, urgent):
        scheduler.add(one)
    assert [item.sequence for item in scheduler.schedule().scheduled] == [urgent, first, second]


def test_the_admission_order_is_replaceable() -> None:
    pool = KvBlockPool(64, 4)
    shortest_first = lambda waiting, now_s, passed: sorted(waiting, key=lambda s: len(s.token_ids))  # noqa: E731
    scheduler = Scheduler(SchedulerConfig(max_batch_tokens=64), pool, cast(Any, Cache()), shortest_first)
    long, short = sequence(9), sequence(3)
    scheduler.add(long)
    scheduler.add(short)
    assert [item.sequence for item in scheduler.schedule().scheduled] == [short, long]


def test_a_wait_for_an_adapter_holds_nobody_back() -> None:
    scheduler, _ = make()
    waits, base = sequence(2, ["a"]), sequence(2)
    scheduler.add(waits)
    scheduler.add(base)
    assert [item.sequence for item in scheduler.schedule().scheduled] == [base]
    assert scheduler.num_waiting_for_adapter == 1
    assert waits in [item.sequence for item in scheduler.schedule().scheduled]
    assert scheduler.num_waiting_for_adapter == 0
    assert waits.adapter_wait_s > 0


def test_more_adapters_than_slots_all_finish() -> None:
    cache = Cache(slots=2)
    scheduler, pool = make(cache=cache)
    sequences = [sequence(3, [f"a{index % 7}"]) for index in range(40)]
    for one in sequences:
        scheduler.add(one)
    for _ in range(1000):
        schedule = scheduler.schedule()
        assert sum(count > 0 for count in cache.references.values()) <= 2
        commit(scheduler, schedule)
        if not scheduler.has_work:
            break
    assert all(one.status is Status.FINISHED and one.num_generated == 4 for one in sequences)
    assert pool.num_used == 0
    assert not any(cache.references.values())


def test_a_hot_adapter_does_not_starve_a_cold_one() -> None:
    """One slot, and a request for the hot adapter arrives at every step; the cold one still gets its turn."""
    scheduler, _ = make(cache=Cache(slots=1), max_adapter_wait_s=5.0)
    cold = sequence(2, ["cold"], arrival_s=0.0)
    scheduler.add(sequence(2, ["hot"], arrival_s=0.0))
    commit(scheduler, scheduler.schedule(0.0))
    scheduler.add(cold)
    for step in range(1, 40):
        scheduler.add(sequence(2, ["hot"]))
        commit(scheduler, scheduler.schedule(float(step)))
        if cold.status is Status.FINISHED:
            break
    assert cold.status is Status.FINISHED
    assert step >= 5, "it was not overtaken at all, so the limit was not what let it in"


def test_an_adapter_that_cannot_be_had_fails_its_request_alone() -> None:
    cache = Cache()
    cache.broken.add("bad")
    scheduler, _ = make(cache=cache)
    bad, base = sequence(2, ["bad"]), sequence(2)
    scheduler.add(bad)
    scheduler.add(base)
    schedule = scheduler.schedule()
    assert [(one, type(error)) for one, error in schedule.failed] == [(bad, NotFoundError)]
    assert [item.sequence for item in schedule.scheduled] == [base]
    assert bad.status is Status.FINISHED


def test_preemption_takes_the_youngest_of_the_lowest_priority() -> None:
    scheduler, pool = make(blocks=6, block_size=4)
    old, young, high = (
        sequence(4, max_tokens=8, arrival_s=1.0),
        sequence(4, max_tokens=8, arrival_s=2.0),
        sequence(4, max_tokens=8, arrival_s=3.0, priority=1),
    )
    for one in (old, young, high):
        scheduler.add(one)
    preempted: list[Sequence] = []
    while scheduler.has_work:
        schedule = scheduler.schedule()
        preempted += [one for one in (old, young, high) if one.preemptions and one not in preempted]
        commit(scheduler, schedule)
        assert scheduler.check_integrity() == []
    assert preempted == [young]
    assert young.num_generated == 8
    assert pool.num_used == 0


def test_a_preempted_sequence_computes_everything_anew_and_keeps_its_adapter() -> None:
    cache = Cache()
    scheduler, _ = make(cache=cache)
    one = sequence(4, ["a"])
    scheduler.add(one)
    scheduler.schedule()
    commit(scheduler, scheduler.schedule())
    scheduler._preempt(one)
    assert (one.num_computed, one.block_table, one.block_keys) == (0, [], [])
    assert cache.references["a"] == 1
    schedule = scheduler.schedule()
    assert tokens(schedule) == [5]
    assert schedule.scheduled[0].samples


def test_the_deadline_frees_everything_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache()
    scheduler, pool = make(cache=cache)
    now_s = time.time()
    late = sequence(4, ["a"], deadline_s=now_s + 60)
    waiting = sequence(4, ["b"], deadline_s=now_s - 1)
    scheduler.add(late)
    scheduler.schedule()
    commit(scheduler, scheduler.schedule())
    assert late.status is Status.RUNNING
    scheduler.add(waiting)
    monkeypatch.setattr(time, "time", lambda: now_s + 61)
    schedule = scheduler.schedule()
    assert {one for one, _ in schedule.failed} == {late, waiting}
    assert all(isinstance(error, DeadlineExceededError) for _, error in schedule.failed)
    assert pool.num_used == 0
    assert not any(cache.references.values())


@pytest.mark.parametrize("seed", range(20))
def test_random_loads_keep_every_invariant(seed: int) -> None:
    rng = random.Random(seed)
    cache = Cache(slots=rng.randint(2, 4))
    scheduler, pool = make(
        blocks=rng.randint(8, 24),
        block_size=rng.choice([1, 3, 4]),
        cache=cache,
        max_batch_tokens=rng.choice([1, 5, 16]),
        max_num_requests=rng.randint(1, 6),
    )
    room = pool.num_blocks * pool.block_size
    live: list[Sequence] = []
    for _ in range(300):
        if rng.random() < 0.5:
            prompt = rng.randint(1, max(1, room // 2))
            names = rng.sample(["a", "b", "c", "d", "e"], rng.choice([0, 1, 1, 2]))
            live.append(
                sequence(
                    prompt,
                    names,
                    max_tokens=rng.randint(1, max(1, room - prompt)),
                    priority=rng.randint(0, 1),
                )
            )
            scheduler.add(live[-1])
        if live and rng.random() < 0.1:
            scheduler.finish(rng.choice(live))
        schedule = scheduler.schedule()
        assert sum(tokens(schedule)) <= scheduler._config.max_batch_tokens
        assert len(scheduler.running) <= scheduler._config.max_num_requests
        for item in schedule.scheduled:
            assert (
                len(item.sequence.block_table) * pool.block_size
                >= item.sequence.num_computed + item.num_tokens
            )
        commit(scheduler, schedule)
        assert scheduler.check_integrity() == []
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        commit(scheduler, scheduler.schedule())
    assert not scheduler.has_work, "not every request finished"
    assert pool.num_used == 0
    assert not any(cache.references.values())


class Prefix(Handle):
    """An adapter that brings keys and values of six virtual tokens."""

    num_virtual_tokens = num_prefix_tokens = 6


def test_a_prefix_costs_blocks_but_no_budget_and_is_copied_anew_after_preemption() -> None:
    cache = Cache()
    cache.arrived.add("a")
    scheduler, pool = make(blocks=6, cache=cache, max_batch_tokens=4)
    request = Request("prefixed", (7,) * 5, SamplingParams(max_tokens=9), (AdapterUse("a"),))
    prefixed = Sequence(request, "client", (cast(AdapterHandle, Prefix("a")),), caches=False)
    scheduler.add(prefixed)
    schedule = scheduler.schedule()
    assert [(item.num_tokens, item.num_copied) for item in schedule.scheduled] == [(4, 6)]
    assert (prefixed.num_computed, pool.num_used) == (6, 3)
    commit(scheduler, schedule)
    urgent = sequence(12, priority=1, max_tokens=1)
    scheduler.add(urgent)
    copied = []
    while scheduler.has_work:
        schedule = scheduler.schedule()
        copied += [item.num_copied for item in schedule.scheduled if item.sequence is prefixed]
        commit(scheduler, schedule)
        assert scheduler.check_integrity() == []
    assert prefixed.preemptions > 0
    assert copied.count(6) == prefixed.preemptions
    assert prefixed.num_generated == 9
    assert pool.num_used == 0
