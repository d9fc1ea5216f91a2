"""The order of admission: deficit round robin over tenants, and within each over its adapters, with aging.

Every tenant, and every mix of adapters that a tenant asks for (a *flow*), has an account of the
tokens computed for it. Turns come in rounds: in each, an account gets a quantum of tokens, so whoever was
given less is in an earlier round and goes first. A second of waiting counts like tokens not given (aging),
so nobody is overtaken for ever, whatever the others ask for. Priorities are strict and stand above all this.

Within a round, requests whose adapter is on the device go before those that need a swap: one swap then serves
a quantum's worth of requests.

Accounts that had nothing in the engine begin again in the round where the others are (start-time fair
queueing): time in which nobody else wanted anything is neither held against a tenant nor saved up by it.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

from loraplex_server.engine.accounts import Account
from loraplex_server.engine.sequence import Sequence

_MAX_IDLE_ACCOUNTS = 1024
"""Accounts kept of those who have nothing in the engine: some 300 KB."""


class Ledger:
    """The accounts of all sequences in the engine, and of a bounded number that were there before."""

    def __init__(self, rounds: DeficitRoundRobin) -> None:
        self._rounds = rounds
        self._root = Account("", None)

    def enter(self, sequence: Sequence) -> None:
        """A new sequence waits: it gets its flow."""
        names = tuple(handle.name for handle in sequence.handles)
        sequence.flow = self._root.part(sequence.request.tenant).part(names)
        for account, _ in sequence.flow.lineage():
            account.live += 1
        self.wait(sequence)

    def wait(self, sequence: Sequence) -> None:
        """A sequence is put into the queue."""
        for account, parent in _flow(sequence).lineage():
            floor = self._floor(parent, idle=account.live == 1)
            account.served = max(account.served, floor)
            account.waiting += 1

    def admit(self, sequence: Sequence, now_s: float) -> None:
        """A sequence leaves the queue and runs."""
        for account, parent in _flow(sequence).lineage():
            account.waiting -= 1
            parent.round = max(parent.round, self._rounds.turn(account.served, sequence, now_s).round)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens are computed for a sequence."""
        flow = _flow(sequence)
        assert flow.parent is not None
        flow.served += num_tokens
        flow.parent.served += num_tokens

    def leave(self, sequence: Sequence, *, waiting: bool) -> None:
        """A sequence is gone; `waiting` if it was in the queue."""
        for account, parent in _flow(sequence).lineage():
            account.waiting -= waiting
            account.live -= 1
            if len(parent.parts) > _MAX_IDLE_ACCOUNTS + parent.live:
                self._forget(parent)

    def _floor(self, parent: Account, *, idle: bool) -> float:
        """The least that a part counts as given: all before this round, once it had nothing left in the
        engine; else all before the last one, so that its quantum stays open to who asks for little at a time.
        """
        return float((parent.round if idle else parent.round - 1) * self._rounds.quantum)

    def _forget(self, parent: Account) -> None:
        """Drops accounts that are not in use; those first that would begin at the floor anyway."""
        floor = self._floor(parent, idle=True)
        kept = {name: part for name, part in parent.parts.items() if part.live or part.served > floor}
        if len(kept) > _MAX_IDLE_ACCOUNTS // 2 + parent.live:
            kept = {name: part for name, part in kept.items() if part.live}
        parent.parts = kept

    def check_integrity(self, waiting: Iterable[Sequence], running: Iterable[Sequence]) -> list[str]:
        """A line for each account whose counts are not those of the queues."""
        queued, everyone = list(waiting), [*waiting, *running]
        problems = []
        for tenant in self._root.parts.values():
            for account in (tenant, *tenant.parts.values()):
                counted = (account.waiting, account.live)
                held = tuple(
                    sum(account in (_flow(one), _flow(one).parent) for one in group)
                    for group in (queued, everyone)
                )
                if counted != held:
                    problems.append(f"account {account.name!r} counts {counted} sequences, there are {held}")
        return problems


@dataclasses.dataclass(frozen=True)
class DeficitRoundRobin:
    """An admission order; see the module. It reads accounts and changes nothing.

    A tenant's first request is offered before those of a tenant that was given no fewer tokens less r quanta,
    if these arrived (r + 1) times `aging_s` after it; and so for the flows of one tenant.

    Attributes:
        quantum: tokens that an account gets in a round.
        aging_s: waiting time that counts as much as a quantum not given.
    """

    quantum: int
    aging_s: float

    def __call__(
        self, waiting: list[Sequence], now_s: float, passed: Container[Account] = ()
    ) -> Iterator[Sequence]:
        flows: defaultdict[Account | None, list[Sequence]] = defaultdict(list)
        for sequence in waiting:
            flows[sequence.flow].append(sequence)
        queues: defaultdict[int, defaultdict[Account, list[_Queue]]] = defaultdict(lambda: defaultdict(list))
        for flow, sequences in flows.items():
            assert flow is not None
            assert flow.parent is not None
            for priority, same in _by_priority(sequences):
                queues[priority][flow.parent].append(_Queue(flow, same))
        for priority in sorted(queues, reverse=True):
            tenants = [_Tenant(tenant, found, self, now_s) for tenant, found in queues[priority].items()]
            yield from _take_turns(tenants, passed)

    def turn(self, served: float, sequence: Sequence, now_s: float) -> _Turn:
        """The turn of an account that was given `served` tokens and whose next request is `sequence`."""
        arrival_s = sequence.arrival_s
        quanta = served / self.quantum - (now_s - arrival_s) / self.aging_s
        resident = sequence.reserved
        if not resident:
            handles = sequence.handles
            resident = handles[0].resident if len(handles) == 1 else all(one.resident for one in handles)
        return _Turn(math.floor(quanta), not resident, arrival_s)

    def cost(self, sequence: Sequence) -> int:
        """Tokens that a sequence will probably take: an answer as long as it may be, up to a quantum."""
        left = sequence.request.sampling.max_tokens - sequence.num_generated
        return sequence.num_pending + min(left, self.quantum)


class _Turn(NamedTuple):
    """A place in the order: the least is first.

    Attributes:
        round: quanta that the account was given, less those that waiting counts for.
        needs_swap: the next request's adapters are not all on the device.
        arrival_s: of the next request.
    """

    round: int
    needs_swap: bool
    arrival_s: float


class _Queue:
    """A flow's requests, first come first served, as far as they were not offered yet; at least one."""

    __slots__ = ("flow", "next", "sequences", "served")

    def __init__(self, flow: Account, sequences: list[Sequence]) -> None:
        self.flow = flow
        self.served = flow.served
        self.sequences = sequences
        self.next = 0

    @property
    def head(self) -> Sequence:
        return self.sequences[self.next]


class _Tenant:
    """A tenant's flows, the one that is next on top of a heap."""

    __slots__ = ("_flows", "_now_s", "_order", "_served")

    def __init__(
        self, account: Account, queues: list[_Queue], order: DeficitRoundRobin, now_s: float
    ) -> None:
        self._served = account.served
        self._order = order
        self._now_s = now_s
        self._flows = [
            (order.turn(queue.served, queue.head, now_s), number, queue)
            for number, queue in enumerate(queues)
        ]
        heapq.heapify(self._flows)

    def head(self, passed: Container[Account]) -> Sequence | None:
        """The tenant's next request; None once it has nothing to offer."""
        flows = self._flows
        while flows and flows[0][2].flow in passed:
            heapq.heappop(flows)
        return flows[0][2].head if flows else None

    def turn(self, passed: Container[Account]) -> _Turn | None:
        """The tenant's turn among tenants; None once it has nothing to offer."""
        head = self.head(passed)
        return None if head is None else self._order.turn(self._served, head, self._now_s)

    def advance(self) -> None:
        """The next request was offered."""
        _, number, queue = self._flows[0]
        tokens = self._order.cost(queue.head)
        self._served += tokens
        queue.served += tokens
        queue.next += 1
        if queue.next < len(queue.sequences):
            turn = self._order.turn(queue.served, queue.head, self._now_s)
            heapq.heapreplace(self._flows, (turn, number, queue))
        else:
            heapq.heappop(self._flows)


def _take_turns(tenants: list[_Tenant], passed: Container[Account]) -> Iterator[Sequence]:
    if len(tenants) == 1:
        while (head := tenants[0].head(passed)) is not None:
            tenants[0].advance()
            yield head
        return
    turns = [(turn, number) for number, tenant in enumerate(tenants) if (turn := tenant.turn(passed))]
    heapq.heapify(turns)
    while turns:
        offered, number = turns[0]
        # What was passed over meanwhile may have been this tenant's best.
        turn = tenants[number].turn(passed)
        if turn == offered and (head := tenants[number].head(passed)) is not None:
            tenants[number].advance()
            yield head
            turn = tenants[number].turn(passed)
        if turn is None:
            heapq.heappop(turns)
        else:
            heapq.heapreplace(turns, (turn, number))


def _by_priority(sequences: list[Sequence]) -> Iterable[tuple[int, list[Sequence]]]:
    first = sequences[0].request.priority
    if len(sequences) == 1 or all(sequence.request.priority == first for sequence in sequences):
        return ((first, sequences),)
    found: defaultdict[int, list[Sequence]] = defaultdict(list)
    for sequence in sequences:
        found[sequence.request.priority].append(sequence)
    return found.items()


def _flow(sequence: Sequence) -> Account:
    assert sequence.flow is not None
    return sequence.flow
