"""The prefix cache under random traffic, against the plainest model: memory that remembers what was written.

No model runs. What a position's keys and values depend on (the tenant, and every token and adapter up to it)
is written to the blocks as a step would, and read back wherever a later step would read.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from hypothesis import event, given, settings
from hypothesis import strategies as st

from loraplex_server.adapters.residency.record import AdapterHandle, Readiness
from loraplex_server.config import SchedulerConfig
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.kv_blocks import KvBlockPool
from loraplex_server.engine.schedule import Schedule
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.sequence import Sequence, Status

INVOCATION = (1, 1)


@dataclasses.dataclass(eq=False)
class Handle:
    """One version of an adapter; its content is not known before it is ready."""

    name: str
    version: int
    ready: bool = False
    resident = True

    @property
    def content_hash(self) -> str:
        return f"{self.name}{self.version}" if self.ready else ""

    @property
    def num_virtual_tokens(self) -> int:
        return {"soft": 3, "prefix": 5}.get(self.name, 0)

    @property
    def num_prefix_tokens(self) -> int:
        return 5 if self.name == "prefix" else 0

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return INVOCATION if self.name == "activated" else ()


class Adapters:
    """Every adapter is ready from the second question on."""

    def reserve(self, handles: tuple[Any, ...]) -> Readiness:
        return Readiness.READY if all(handle.ready for handle in handles) else Readiness.LOADING

    def is_ready(self, handles: tuple[Any, ...]) -> Readiness:
        for handle in handles:
            handle.ready = True
        return Readiness.READY

    def unreserve(self, handles: tuple[Any, ...]) -> None:
        pass

    def device_references(self, name: str) -> int:
        return 0

    def failure(self, handles: tuple[Any, ...]) -> None:
        return None


class World:
    """A scheduler, and the memory that its steps write and read."""

    def __init__(self, num_blocks: int, block_size: int, budget: int, caches: bool) -> None:
        self.pool = KvBlockPool(num_blocks, block_size)
        config = SchedulerConfig(max_batch_tokens=budget, max_num_requests=4)
        self.scheduler = Scheduler(config, self.pool, cast(Any, Adapters()))
        self.versions = dict.fromkeys(("a", "b", "soft", "prefix", "activated"), 0)
        self.sequences: list[Sequence] = []
        self.hits = 0
        self._caches = caches
        self._memory: dict[int, dict[int, int]] = {block: {} for block in range(num_blocks)}
        # What full blocks were ever written, as what their last position depends on.
        self._written: set[int] = set()

    def submit(self, tenant: str, names: tuple[str, ...], prompt: list[int], caches: bool) -> None:
        handles = tuple(cast(AdapterHandle, Handle(name, self.versions[name])) for name in names)
        request = Request(
            f"r{len(self.sequences)}",
            tuple(prompt),
            SamplingParams(max_tokens=1 + len(prompt) % 5),
            tuple(AdapterUse(name) for name in names),
            tenant,
        )
        sequence = Sequence(request, "client", handles, caches=self._caches and caches)
        room = self.pool.num_blocks * self.pool.block_size
        if sequence.num_prompt + request.sampling.max_tokens <= room:
            self.sequences.append(sequence)
            self.scheduler.add(sequence)

    def step(self) -> None:
        before = set(self.scheduler.waiting)
        schedule = self.scheduler.schedule()
        size = self.pool.block_size
        for item in schedule.scheduled:
            sequence = item.sequence
            first = sequence.num_computed - item.num_copied
            if sequence in before:
                self._check_hit(sequence, first)
            for position in range(first, sequence.num_computed + item.num_tokens):
                block = sequence.block_table[position // size]
                self._memory[block][position % size] = _truth(sequence, position)
        for item in schedule.scheduled:
            for position in range(item.sequence.num_computed + item.num_tokens):
                block = item.sequence.block_table[position // size]
                assert self._memory[block][position % size] == _truth(item.sequence, position)
        self._check_shares(schedule)
        self._commit(schedule)
        assert self.scheduler.check_integrity() == []

    def drain(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("not every request finished")

    def _check_shares(self, schedule: Schedule) -> None:
        """No two prompts have the same block computed beside each other, but for that of their last token."""
        size = self.pool.block_size
        filled = [
            _truth(item.sequence, end)
            for item in schedule.scheduled
            for end in range(size - 1, len(item.sequence.token_ids) - 1, size)
            if item.sequence.caches
            and item.sequence.num_computed <= end < item.sequence.num_computed + item.num_tokens
        ]
        assert len(set(filled)) == len(filled)

    def _check_hit(self, sequence: Sequence, found_tokens: int) -> None:
        """It found no more than was ever written, and no less where nothing had to be evicted."""
        size = self.pool.block_size
        ends = range(size - 1, len(sequence.token_ids) - 1, size)
        known = next(
            (n for n, end in enumerate(ends) if _truth(sequence, end) not in self._written), len(ends)
        )
        found = found_tokens // size
        self.hits += found
        assert sequence.num_computed < len(sequence.token_ids)
        assert found <= known
        if not sequence.caches:
            assert found == 0
        elif self.pool.num_blocks >= 1000:
            assert found == known

    def _commit(self, schedule: Schedule) -> None:
        size = self.pool.block_size
        for item in schedule.scheduled:
            sequence, samples = item.sequence, item.samples
            sequence.num_computed += item.num_tokens
            for block, key in sequence.new_block_keys(size):
                self.pool.set_key(block, key)
            if sequence.caches:
                ends = range(size - 1, sequence.num_computed, size)
                self._written |= {_truth(sequence, end) for end in ends}
            if samples:
                # As under greedy decoding: equal beginnings go on alike.
                sequence.token_ids.append(_truth(sequence, len(sequence.token_ids) - 1) % 2)
                if sequence.num_generated >= sequence.request.sampling.max_tokens:
                    self.scheduler.finish(sequence)


def _truth(sequence: Sequence, position: int) -> int:
    """A number for everything that keys and values at a position depend on; does not use `block_key`."""
    handles, tokens = cast(tuple[Handle, ...], sequence.handles), sequence.token_ids
    prompt = sequence.request.prompt_token_ids
    invoked = max(
        (at for at in range(len(prompt)) if prompt[at : at + 2] == INVOCATION), default=len(tokens) + 1
    )
    value = hash(sequence.request.tenant)
    for at, token in enumerate(tokens[: position + 1]):
        active = [
            (handle.name, handle.version)
            for handle in handles
            if (not handle.num_virtual_tokens or at < handle.num_virtual_tokens)
            and (handle.name != "activated" or at >= invoked)
        ]
        value = hash((value, token, tuple(active)))
    return value


_PROMPTS = st.tuples(st.sampled_from(["", "0", "1", "01"]), st.integers(1, 13), st.integers(0, 3)).map(
    lambda drawn: [int(digit) for digit in (drawn[0] + "0110100110010110")[: drawn[1]]] + [1] * drawn[2]
)
_SUBMIT = st.tuples(
    st.just("submit"),
    st.sampled_from(["x", "x", "y"]),
    st.sampled_from([(), (), ("a",), ("b",), ("a", "b"), ("b", "a"), ("soft",), ("prefix",), ("activated",)]),
    _PROMPTS,
    st.sampled_from([True, True, True, False]),
)
_ACTIONS = st.one_of(
    _SUBMIT,
    _SUBMIT,
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 99)),
    st.tuples(st.just("reload"), st.sampled_from(["a", "b", "soft", "prefix", "activated"])),
)


@settings(max_examples=120, deadline=None)
@given(
    num_blocks=st.sampled_from([6, 9, 14, 1000]),
    block_size=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([3, 7, 64]),
    caches=st.sampled_from([True, True, True, False]),
    actions=st.lists(_ACTIONS, min_size=10, max_size=60),
)
def test_what_is_read_is_what_was_written(
    num_blocks: int, block_size: int, budget: int, caches: bool, actions: list[tuple[Any, ...]]
) -> None:
    world = World(num_blocks, block_size, budget, caches)
    for name, *arguments in actions:
        match name:
            case "submit":
                world.submit(*arguments)
            case "step":
                for _ in range(arguments[0]):
                    world.step()
            case "cancel" if world.sequences:
                world.scheduler.finish(world.sequences[arguments[0] % len(world.sequences)])
            case "reload":
                world.versions[arguments[0]] += 1
        assert world.scheduler.check_integrity() == []
    world.drain()
    # All once more, as far as it was not cancelled: now most of it was there before.
    for action in actions:
        if action[0] == "submit":
            world.submit(*action[1:])
    world.drain()
    assert all(sequence.status is Status.FINISHED for sequence in world.sequences)
    assert world.pool.num_used == 0
    if not caches:
        assert (world.hits, world.pool.num_cached) == (0, 0)
    event(f"hits: {bool(world.hits)}, preempted: {any(s.preemptions for s in world.sequences)}")


def test_where_in_a_block_an_adapter_begins_is_part_of_its_key() -> None:
    """The last invocation counts, so one more token may move it within a block of the same tokens."""
    keys = []
    for tail in ((0, 0), (1, 0)):
        handle = Handle("activated", 0, ready=True)
        request = Request("r", (0, 0, *INVOCATION, *tail), adapters=(AdapterUse("activated"),))
        sequence = Sequence(request, "client", (cast(AdapterHandle, handle),), caches=True)
        keys += list(sequence.reusable_keys(4))
    assert len(set(keys)) == 2
