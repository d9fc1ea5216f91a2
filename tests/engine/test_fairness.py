"""The order of requests: rounds, aging, priorities, and simulations of popular and rare adapters."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, cast

import pytest

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.config import SchedulerConfig
from loraplex_server.core.errors import ServerError
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.accounts import Account
from loraplex_server.engine.fairness import DeficitRoundRobin, Ledger
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.scheduler import AdmissionOrder, Scheduler
from loraplex_server.engine.sequence import Sequence, Status

STEP_S = 0.01


@dataclasses.dataclass
class Handle:
    """A request's reference to an adapter, as far as the scheduler looks at it."""

    name: str
    device: Device | None = None
    num_virtual_tokens = 0
    num_prefix_tokens = 0
    invocation_tokens: tuple[int, ...] = ()
    content_hash = "hash"

    @property
    def resident(self) -> bool:
        return self.device is not None and self.device.has(self.name)


class Device:
    """Slots; idle adapters leave, least recently used first; a swap takes `swap_s`."""

    def __init__(self, slots: int, swap_s: float = 0.0) -> None:
        self.slots = slots
        self.swap_s = swap_s
        self.now_s = 0.0
        self.swaps = 0
        self.references: Counter[str] = Counter()
        self.ready_s: dict[str, float] = {}

    def has(self, name: str) -> bool:
        return self.ready_s.get(name, math.inf) <= self.now_s

    def reserve(self, handles: Seq[Any]) -> Readiness:
        names = [handle.name for handle in handles]
        missing = [name for name in names if name not in self.ready_s]
        idle = [name for name in self.ready_s if not self.references[name] and name not in names]
        if len(self.ready_s) - len(idle) + len(missing) > self.slots:
            return Readiness.BLOCKED
        while len(self.ready_s) + len(missing) > self.slots:
            del self.ready_s[idle.pop(0)]
        for name in missing:
            self.swaps += 1
            self.ready_s[name] = self.now_s + self.swap_s
        for name in names:
            self.references[name] += 1
            self.ready_s[name] = self.ready_s.pop(name)
        return self.is_ready(handles)

    def is_ready(self, handles: Seq[Any]) -> Readiness:
        return Readiness.READY if all(self.has(handle.name) for handle in handles) else Readiness.LOADING

    def unreserve(self, handles: Seq[Any]) -> None:
        self.references.subtract(handle.name for handle in handles)

    def device_references(self, name: str) -> int:
        return self.references[name]

    def failure(self, handles: Seq[Any]) -> ServerError | None:
        return None


_ids = iter(range(10**9))


def sequence(
    adapters: Seq[str] = (),
    *,
    arrival_s: float = 0.0,
    prompt: int = 4,
    max_tokens: int = 4,
    tenant: str = "default",
    priority: int = 0,
    device: Device | None = None,
) -> Sequence:
    request = Request(
        f"r{next(_ids)}",
        tuple(range(prompt)),
        SamplingParams(max_tokens=max_tokens),
        tuple(AdapterUse(name) for name in adapters),
        tenant=tenant,
        priority=priority,
    )
    handles = tuple(cast(AdapterHandle, Handle(name, device)) for name in adapters)
    return Sequence(request, "client", handles, arrival_s=arrival_s)


class Simulation:
    """A scheduler on a simulated device and clock. Every step takes `STEP_S`."""

    def __init__(
        self, slots: int, *, swap_s: float = 0.0, order: AdmissionOrder | None = None, **settings: Any
    ) -> None:
        self.device = Device(slots, swap_s)
        self.now_s = 0.0
        self.config = SchedulerConfig(**{"max_batch_tokens": 64, "max_num_requests": 8, **settings})
        self.blocks = KvBlockPool(4096, 4)
        self.scheduler = Scheduler(self.config, self.blocks, cast(Any, self.device), order)
        self.admitted: list[Sequence] = []
        self.admitted_s: dict[Sequence, float] = {}

    def add(self, *adapters: str, **options: Any) -> Sequence:
        one = sequence(adapters, arrival_s=self.now_s, device=self.device, **options)
        self.scheduler.add(one)
        return one

    def step(self) -> None:
        self.device.now_s = self.now_s
        for item in self.scheduler.schedule(self.now_s).scheduled:
            one, samples = item.sequence, item.samples
            if one not in self.admitted_s:
                self.admitted.append(one)
                self.admitted_s[one] = self.now_s
            one.num_computed += item.num_tokens
            if samples:
                one.token_ids.append(0)
                if one.num_generated >= one.request.sampling.max_tokens:
                    self.scheduler.finish(one)
        self.now_s += STEP_S

    def keep_waiting(self, count: int, *adapters: str, **options: Any) -> None:
        """Tops the queue up to `count` requests like this."""
        tenant = options.get("tenant", "default")
        waiting = sum(
            tuple(handle.name for handle in one.handles) == adapters and one.request.tenant == tenant
            for one in self.scheduler.waiting
        )
        for _ in range(waiting, count):
            self.add(*adapters, **options)

    def assert_clean(self) -> None:
        assert self.scheduler.check_integrity() == []
        assert not any(self.device.references.values())
        assert self.blocks.num_used == 0


# The order by itself


def accounts(rng: random.Random, *, tenants: int = 4, flows: int = 4) -> tuple[list[Sequence], Ledger]:
    """Waiting sequences with a past."""
    ledger = Ledger(DeficitRoundRobin(64, 5.0))
    waiting = []
    for index in range(rng.randint(5, 60)):
        one = sequence(
            [f"a{rng.randrange(flows)}"] if rng.random() < 0.9 else [],
            arrival_s=index * rng.random(),
            prompt=rng.randint(1, 30),
            max_tokens=rng.randint(1, 30),
            tenant=f"t{rng.randrange(tenants)}",
            priority=rng.choice([0, 0, 0, 1, -1]),
        )
        waiting.append(one)
    waiting.sort(key=lambda one: one.arrival_s)
    for one in waiting:
        ledger.enter(one)
        if rng.random() < 0.3:
            ledger.charge(one, rng.randint(1, 500))
    return waiting, ledger


@pytest.mark.parametrize("seed", range(30))
def test_everyone_is_offered_once_by_priority_and_each_flow_in_order_of_arrival(seed: int) -> None:
    rng = random.Random(seed)
    waiting, _ = accounts(rng)
    order = DeficitRoundRobin(rng.choice([1, 64, 512]), rng.choice([0.1, 5.0]))
    served = [(one.flow.served, one.flow.parent.served) for one in waiting if one.flow and one.flow.parent]
    offered = list(order(waiting, 100.0))
    assert Counter(offered) == Counter(waiting)
    assert [one.request.priority for one in offered] == sorted(
        (one.request.priority for one in waiting), reverse=True
    )
    by_flow: defaultdict[tuple[Account | None, int], list[float]] = defaultdict(list)
    for one in offered:
        by_flow[one.flow, one.request.priority].append(one.arrival_s)
    assert all(arrivals == sorted(arrivals) for arrivals in by_flow.values())
    # Pure: the same again, and nothing was charged.
    assert list(order(waiting, 100.0)) == offered
    assert served == [
        (one.flow.served, one.flow.parent.served) for one in waiting if one.flow and one.flow.parent
    ]


def gaps(offered: Iterable[Sequence], cost: Callable[[Sequence], int], key: Callable[[Sequence], Any]) -> int:
    """The most by which the tokens offered to two keys ever differ while both have more to come."""
    offered = list(offered)
    left = Counter(key(one) for one in offered)
    given: Counter[Any] = Counter()
    worst = 0
    for one in offered:
        given[key(one)] += cost(one)
        left[key(one)] -= 1
        open_keys = [name for name, count in left.items() if count]
        if open_keys:
            counts = [given[name] for name in open_keys]
            worst = max(worst, max(counts) - min(counts))
    return worst


@pytest.mark.parametrize("seed", range(10))
def test_tenants_and_their_adapters_get_a_quantum_each_in_turn(seed: int) -> None:
    """Deficit round robin's bound: two who both wait differ by a quantum and a request at most."""
    rng = random.Random(seed)
    order = DeficitRoundRobin(rng.choice([50, 200]), aging_s=1e9)
    ledger = Ledger(order)
    waiting = [
        sequence(
            [f"a{rng.randrange(1 if tenant == 't0' else 3)}"],
            prompt=rng.randint(1, 30),
            max_tokens=rng.randint(1, 30),
            tenant=tenant,
            arrival_s=float(index),
        )
        for index in range(150)
        for tenant in ("t0", "t1", "t2")
    ]
    for one in waiting:
        ledger.enter(one)
    largest = max(order.cost(one) for one in waiting)
    offered = list(order(waiting, 500.0))
    assert gaps(offered, order.cost, lambda one: one.request.tenant) <= order.quantum + largest
    for tenant in ("t0", "t1", "t2"):
        own = [one for one in offered if one.request.tenant == tenant]
        assert gaps(own, order.cost, lambda one: one.flow) <= order.quantum + largest


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_offered_after_one_that_came_much_later(seed: int) -> None:
    """The bound that the order states, for the tenants' first requests and for the flows of one tenant."""
    rng = random.Random(seed)
    order = DeficitRoundRobin(rng.choice([16, 64]), rng.choice([0.5, 2.0]))
    waiting = [one for one in accounts(rng)[0] if one.request.priority == 0]
    offered = list(order(waiting, 100.0))
    firsts: dict[Account | None, Sequence] = {}
    for one in offered:
        assert one.flow is not None
        firsts.setdefault(one.flow.parent, one)
    compared = list(firsts.items())
    for index, (tenant, first) in enumerate(compared):
        for other, later in compared[:index]:
            assert tenant is not None
            assert other is not None
            lead = max(0.0, (tenant.served - other.served) / order.quantum)
            assert later.arrival_s - first.arrival_s <= (lead + 1) * order.aging_s + 1e-9


def test_within_a_round_those_whose_adapter_is_there_go_first() -> None:
    device = Device(1)
    device.ready_s["there"] = 0.0
    order = DeficitRoundRobin(100, 5.0)
    ledger = Ledger(order)
    waiting = [sequence([name], device=device, prompt=30, max_tokens=10) for name in ["far", "there"] * 4]
    for one in waiting:
        ledger.enter(one)
    names = [one.handles[0].name for one in order(waiting, 0.0)]
    # 40 tokens a request: a quantum of 100 is three of them, then the other's turn has come.
    assert names == ["there"] * 3 + ["far"] * 3 + ["there", "far"]


def test_time_without_competition_is_neither_saved_up_nor_held_against_anyone() -> None:
    order = DeficitRoundRobin(10, 1e9)
    ledger = Ledger(order)
    for _ in range(50):
        alone = sequence(["a"], tenant="busy")
        ledger.enter(alone)
        ledger.admit(alone, 0.0)
        ledger.charge(alone, 8)
    ledger.enter(sequence(["a"], tenant="busy"))
    waiting = [sequence(["a"], tenant=tenant) for _ in range(20) for tenant in ("busy", "new")]
    for one in waiting:
        ledger.enter(one)
    first = [one.request.tenant for one in order(waiting, 0.0)][:20]
    # A newcomer is a quantum of 10 ahead, and a round: three requests of 8 tokens.
    assert 7 <= first.count("busy") <= 10


def test_accounts_of_those_who_are_gone_are_forgotten() -> None:
    ledger = Ledger(DeficitRoundRobin(100, 5.0))
    for index in range(5000):
        one = sequence([f"a{index}"], tenant=f"t{index}")
        ledger.enter(one)
        ledger.admit(one, 0.0)
        ledger.charge(one, 10 if index % 2 else 10_000)
        ledger.leave(one, waiting=False)
    assert len(ledger._root.parts) <= 1025
    assert ledger._root.live == ledger._root.waiting == 0


def test_the_work_of_a_step_grows_with_flows_not_with_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 wait for 10 adapters, 4 of them run: a step places 10 heads, and not 1,000 requests."""
    simulation = Simulation(4, max_num_requests=1000, max_batch_tokens=10_000)
    for index in range(1000):
        simulation.add(f"a{index % 10}", max_tokens=1000)
    simulation.step()
    turns = 0
    original = DeficitRoundRobin.turn

    def counted(self: DeficitRoundRobin, served: float, one: Sequence, now_s: float) -> Any:
        nonlocal turns
        turns += 1
        return original(self, served, one, now_s)

    monkeypatch.setattr(DeficitRoundRobin, "turn", counted)
    simulation.step()
    assert len(simulation.scheduler.waiting) == 600
    assert turns <= 30


# Simulations


def starving(waiting: list[Sequence], now_s: float, passed: object = ()) -> list[Sequence]:
    """A faulty order that the simulations must detect: requests with resident adapters always go first."""
    del now_s, passed
    return sorted(waiting, key=lambda one: not all(handle.resident for handle in one.handles))


def cold_waits(seed: int, *, order: AdmissionOrder | None = None, patience_s: float = 0.5) -> tuple[Any, ...]:
    """Hot adapters, no fewer than slots, with requests waiting all the time; now and then a cold one."""
    rng = random.Random(seed)
    slots, answer = rng.randint(1, 4), rng.randint(2, 12)
    simulation = Simulation(
        slots,
        swap_s=rng.choice([0.0, 0.03]),
        order=order,
        max_adapter_wait_s=patience_s,
        max_num_requests=rng.choice([4, 16]),
        fair_quantum=rng.choice([64, 256]),
        fair_aging_s=rng.choice([0.2, 2.0]),
    )
    hot = [f"hot{index}" for index in range(rng.randint(slots, slots + 3))]
    cold: list[Sequence] = []
    for step in range(900):
        for name in hot:
            simulation.keep_waiting(rng.randint(1, 12), name, max_tokens=rng.randint(1, answer))
        if step % 120 == 60:
            cold.append(simulation.add(f"cold{step}", max_tokens=answer))
        simulation.step()
    waits = [simulation.admitted_s.get(one, math.inf) - one.arrival_s for one in cold]
    overtakers = [
        sum(
            simulation.admitted_s.get(other, math.inf) < simulation.admitted_s.get(one, math.inf)
            and other.arrival_s > one.arrival_s + bound(simulation, answer)
            for other in simulation.admitted
        )
        for one in cold
    ]
    return simulation, waits, overtakers, answer


def bound(simulation: Simulation, answer: int) -> float:
    """The longest wait, in seconds, of a request whose adapter is not resident.

    It waits for a place in the batch: a round, in which each flow gets a quantum and a request. It waits for
    a slot: its patience, then until no adapter in use gets more requests (their number doubles every four
    times the patience), then until the running ones end. Last comes the swap.
    """
    config, slots = simulation.config, simulation.device.slots
    flows = slots + 4
    longest_s = (answer + 2) * STEP_S
    batches = flows * (config.fair_quantum + 4 + answer) / (config.max_num_requests * 2)
    doublings = math.ceil(math.log2(slots))
    return (
        2 * batches * STEP_S
        + config.max_adapter_wait_s * (2 + 4 * doublings)
        + 2 * longest_s
        + simulation.device.swap_s
        + 2 * config.fair_aging_s
    )


@pytest.mark.parametrize("seed", range(16))
def test_no_adapter_starves_however_hot_the_others(seed: int) -> None:
    simulation, waits, overtakers, answer = cold_waits(seed)
    assert len(waits) >= 7
    limit = bound(simulation, answer)
    # The last may still wait, rightly so, when the simulation ends.
    settled = [wait for wait in waits[:-3] if math.isfinite(wait)]
    assert len(settled) == len(waits) - 3
    assert max(settled) <= limit
    assert not any(overtakers)


def test_the_simulation_finds_starvation_where_there_is_some() -> None:
    starved = 0
    for seed in range(6):
        waits = cold_waits(seed, order=starving, patience_s=1e9)[1]
        starved += sum(math.isinf(wait) for wait in waits)
    assert starved > 6


@pytest.mark.parametrize("seed", range(10))
def test_random_traffic_over_more_adapters_than_slots_all_ends(seed: int) -> None:
    """Compositions, tenants, priorities; and those of one priority are not overtaken beyond the bound."""
    rng = random.Random(seed)
    simulation = Simulation(
        rng.randint(2, 4),
        swap_s=rng.choice([0.0, 0.02]),
        max_adapter_wait_s=rng.choice([0.0, 0.1]),
        fair_quantum=rng.choice([8, 100]),
        fair_aging_s=0.5,
    )
    names = [f"a{index}" for index in range(12)]
    everyone = []
    for _ in range(300):
        if rng.random() < 0.35:
            everyone.append(
                simulation.add(
                    *rng.sample(names, rng.choice([0, 1, 1, 1, 2])),
                    max_tokens=rng.randint(1, 8),
                    tenant=f"t{rng.randrange(3)}",
                    priority=rng.choice([0, 0, 1]),
                )
            )
        simulation.step()
        assert simulation.scheduler.check_integrity() == []
    for _ in range(3000):
        if not simulation.scheduler.has_work:
            break
        simulation.step()
    assert all(one.status is Status.FINISHED for one in everyone)
    simulation.assert_clean()


def test_a_tenant_with_fifty_adapters_gets_no_more_than_one_with_one() -> None:
    simulation = Simulation(64, max_num_requests=4)
    for _ in range(600):
        for index in range(50):
            simulation.keep_waiting(1, f"many{index}", tenant="many")
        simulation.keep_waiting(20, "single", tenant="single")
        simulation.step()
    counts = Counter(one.request.tenant for one in simulation.admitted)
    assert counts["many"] == pytest.approx(counts["single"], rel=0.1)


def test_adapters_of_one_tenant_share_alike_whatever_each_asks() -> None:
    simulation = Simulation(8, max_num_requests=4)
    for _ in range(600):
        simulation.keep_waiting(50, "hot")
        simulation.keep_waiting(4, "warm")
        simulation.step()
    counts = Counter(one.handles[0].name for one in simulation.admitted)
    assert counts["warm"] == pytest.approx(counts["hot"], rel=0.1)


def test_a_higher_priority_goes_first_whatever_was_served() -> None:
    simulation = Simulation(8, max_num_requests=2, fair_aging_s=0.05)
    for _ in range(300):
        simulation.keep_waiting(5, "low")
        simulation.keep_waiting(3, "high", priority=1)
        simulation.step()
    late = [one for one in simulation.admitted[2:] if one.request.priority == 0]
    assert late == [], "a request of high priority waited at each step"


def test_one_swap_serves_a_quantum_of_requests() -> None:
    """Six adapters through one slot, all with requests waiting: as many swaps as quanta, not as requests."""
    simulation = Simulation(1, max_num_requests=4, fair_quantum=64, max_adapter_wait_s=0.05)
    for _ in range(1000):
        for index in range(6):
            simulation.keep_waiting(10, f"a{index}")
        simulation.step()
    counts = Counter(one.handles[0].name for one in simulation.admitted)
    assert len(counts) == 6
    assert max(counts.values()) < 2 * min(counts.values())
    assert len(simulation.admitted) > 5 * simulation.device.swaps > 0


def test_a_swap_for_one_that_waited_long_holds_back_one_adapter_and_not_all() -> None:
    simulation = Simulation(4, max_num_requests=1000, max_batch_tokens=10_000, max_adapter_wait_s=0.1)
    cold = None
    admitted: Counter[str] = Counter()
    for step in range(80):
        for index in range(4):
            simulation.keep_waiting(2, f"hot{index}", max_tokens=30 if index else 12)
        if step == 40:
            cold = simulation.add("cold")
        before = len(simulation.admitted)
        simulation.step()
        # From the first patience to the second, one of the four is drained, the others go on.
        if cold is not None and 0.11 < simulation.now_s - cold.arrival_s < 0.19:
            admitted.update(one.handles[0].name for one in simulation.admitted[before:])
    assert cold is not None
    assert cold in simulation.admitted_s
    assert len([name for name in admitted if name.startswith("hot")]) >= 3
