"""From a schedule to the integers of a step: rows, cells, runs of equal composition, draws and masks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

from loraplex_server.adapters.residency.record import AdapterHandle
from loraplex_server.core.random import uniform
from loraplex_server.core.request import AdapterUse, Request, SamplingParams
from loraplex_server.engine.planning import build_plan
from loraplex_server.engine.schedule import Scheduled
from loraplex_server.engine.sequence import Mix, Sequence


class Handle:
    num_virtual_tokens = 0
    num_prefix_tokens = 0
    invocation_tokens: tuple[int, ...] = ()
    content_hash = "hash"

    def __init__(self, name: str) -> None:
        self.name = name


SLOTS = {"a": 2, "b": 5}


def slot_of(handle: AdapterHandle) -> int:
    return SLOTS[handle.name]


def sequence(
    tokens: int, computed: int, blocks: list[int], adapters: tuple[AdapterUse, ...] = (), **sampling: Any
) -> Sequence:
    request = Request(f"r{tokens}", tuple(range(100, 100 + tokens)), SamplingParams(**sampling), adapters)
    handles = tuple(cast(AdapterHandle, Handle(use.name)) for use in adapters)
    made = Sequence(request, "client", handles)
    made.num_computed = computed
    made.block_table = blocks
    return made


def test_the_worked_example() -> None:
    """The one in `StepPlan`: a decode at position 5, and three tokens of a prompt with an adapter."""
    decode = sequence(6, 5, [8, 3])
    prefill = sequence(3, 0, [9], (AdapterUse("a"),))
    plan = build_plan([Scheduled(decode, 1), Scheduled(prefill, 3)], 4, slot_of, ())
    assert plan.token_ids.tolist() == [105, 100, 101, 102]
    assert plan.positions.tolist() == [5, 0, 1, 2]
    assert plan.slot_mapping.tolist() == [13, 36, 37, 38]
    assert plan.query_start.tolist() == [0, 1, 4]
    assert plan.context_len.tolist() == [6, 3]
    assert (plan.block_start.tolist(), plan.blocks.tolist()) == ([0, 2, 3], [8, 3, 9])
    assert plan.runs == [(1, 4, ((2, 1.0),))]
    assert plan.sample_row.tolist() == [0, 3]


def test_a_chunk_that_does_not_reach_the_end_samples_nothing() -> None:
    plan = build_plan([Scheduled(sequence(9, 4, [0, 1, 2]), 3)], 4, slot_of, ())
    assert plan.positions.tolist() == [4, 5, 6]
    assert plan.context_len.tolist() == [7]
    assert plan.blocks.tolist() == [0, 1]
    assert len(plan.sample_row) == len(plan.uniform) == 0


def test_adapters_belong_to_tokens_not_to_requests() -> None:
    """A kind of adapter that begins at an invocation sequence answers differently along the row."""

    class Activated(Sequence):
        __slots__ = ()
        adapter_changes = (2, 5)

        def adapters_at(self, position: int) -> Mix:
            both = super().adapters_at(position)
            return () if position < 2 else both[:1] if position < 5 else both

    made = sequence(7, 0, [0, 1], (AdapterUse("a"), AdapterUse("b", 0.5)))
    activated = Activated(made.request, "client", made.handles)
    activated.block_table = made.block_table
    before = sequence(3, 2, [4])
    plan = build_plan([Scheduled(before, 1), Scheduled(activated, 7)], 4, slot_of, ())
    assert plan.runs == [(3, 6, ((2, 1.0),)), (6, 8, ((2, 1.0), (5, 0.5)))]


def test_draws_and_masks_follow_the_request() -> None:
    first = sequence(
        4, 3, [0], temperature=0.5, top_k=7, top_p=0.9, seed=3, min_tokens=1, stop_token_ids=(8, 2)
    )
    second = sequence(2, 1, [1], logprobs=4)
    plan = build_plan([Scheduled(first, 1), Scheduled(second, 1)], 4, slot_of, (2, 9))
    assert plan.uniform.tolist() == [uniform(3, 4), 0.0]  # greedy rows are not drawn
    assert (plan.temperature.tolist(), plan.top_k.tolist(), plan.top_p.tolist()) == (
        [0.5, 0],
        [7, 0],
        [0.9, 1],
    )
    assert plan.num_logprobs.tolist() == [-1, 4]
    assert (plan.banned_start.tolist(), plan.banned_ids.tolist()) == ([0, 3, 3], [2, 9, 8])


def test_drafts_are_rows_as_if_they_were_known() -> None:
    """Positions, draws, bans, minima and counts of each row are those of decoding up to it one by one."""
    made = sequence(
        4,
        3,
        [0, 2],
        (AdapterUse("a"),),
        temperature=0.5,
        seed=3,
        min_tokens=2,
        stop_token_ids=(8,),
        logprobs=1,
        bad_words=((103, 9), (50, 7), (50, 60, 5)),
        frequency_penalty=0.5,
    )
    other = sequence(2, 1, [1])
    plan = build_plan([Scheduled(made, 1, drafts=(50, 60, 50)), Scheduled(other, 1)], 4, slot_of, (2,))
    assert plan.token_ids.tolist() == [103, 50, 60, 50, 101]
    assert plan.positions.tolist() == [3, 4, 5, 6, 1]
    assert plan.slot_mapping.tolist() == [3, 8, 9, 10, 5]
    assert (plan.query_start.tolist(), plan.context_len.tolist()) == ([0, 4, 5], [7, 2])
    assert plan.runs == [(0, 4, ((2, 1.0),))]
    assert plan.sample_row.tolist() == [0, 1, 2, 3, 4]
    assert plan.uniform.tolist() == [*(uniform(3, position) for position in (4, 5, 6, 7)), 0.0]
    assert plan.num_logprobs.tolist() == [1, 1, 1, 1, -1]
    bans = [plan.banned_ids[i:j].tolist() for i, j in pairwise(plan.banned_start.tolist())]
    assert bans == [[9, 2, 8], [7, 2, 8], [5], [7], []]
    seen = [
        dict(zip(plan.seen_ids[i:j].tolist(), plan.seen_count[i:j].tolist(), strict=True))
        for i, j in pairwise(plan.seen_start.tolist())
    ]
    prompt = {100: 0, 101: 0, 102: 0, 103: 0}
    assert seen == [prompt, {**prompt, 50: 1}, {**prompt, 50: 1, 60: 1}, {**prompt, 50: 2, 60: 1}, {}]
    assert made.token_counts.update(made.token_ids, 4)[0].tolist() == [100, 101, 102, 103]


def test_block_keys_name_tenant_adapters_and_weights() -> None:
    def keys(tenant: str, adapters: tuple[AdapterUse, ...]) -> list[bytes]:
        made = sequence(9, 8, [3, 4, 5], adapters)
        request = Request("r", made.request.prompt_token_ids, adapters=adapters, tenant=tenant)
        owner = Sequence(request, "client", made.handles, caches=True)
        owner.num_computed, owner.block_table = 8, [3, 4, 5]
        fresh = owner.new_block_keys(4)
        assert [block for block, _ in fresh] == [3, 4]
        assert owner.new_block_keys(4) == []
        return [key for _, key in fresh]

    a, half = AdapterUse("a"), AdapterUse("a", 0.5)
    found = [keys(*owner) for owner in (("x", ()), ("y", ()), ("x", (a,)), ("x", (half,)), ("x", (a, a)))]
    assert len({key for pair in found for key in pair}) == 10
    assert keys("x", (a,)) == found[2]


class Prefix(Handle):
    """An adapter that brings keys and values of five virtual tokens."""

    num_virtual_tokens = num_prefix_tokens = 5


def test_a_prefix_is_copied_and_not_computed() -> None:
    request = Request("r", (100, 101, 102), SamplingParams(), (AdapterUse("b"),))
    made = Sequence(request, "client", (cast(AdapterHandle, Prefix("b")),))
    made.block_table, made.num_computed = [6, 3], 5
    plan = build_plan([Scheduled(sequence(6, 5, [8, 2]), 1), Scheduled(made, 2, 3)], 4, slot_of, ())
    # Two of the five were found in the cache.
    assert (plan.prefix_slot.tolist(), plan.prefix_first.tolist()) == ([5], [2])
    assert plan.prefix_start.tolist() == [0, 3]
    assert plan.prefix_cells.tolist() == [6 * 4 + 2, 6 * 4 + 3, 3 * 4]
    assert plan.token_ids.tolist() == [105, 100, 101]
    assert plan.positions.tolist() == [5, 5, 6]
    assert plan.context_len.tolist() == [6, 7]
    assert plan.runs == []
