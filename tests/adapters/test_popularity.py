"""Eviction by popularity: the heap that finds the least popular, and hit rates compared with plain LRU."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import pytest

from loraplex_server.adapters.residency.popularity import NEVER_USED, LeastPopularFirst, Popularity
from loraplex_server.adapters.residency.record import Record

SLOTS = 32
ADAPTERS = 5_000
REQUESTS = 20_000


def record(name: str = "") -> Record:
    nothing = cast(Any, None)
    return Record(name, "", nothing, nothing, units=0, host_bytes=0)


def test_one_use_each_is_least_recently_used() -> None:
    popularity, records = Popularity(64), [record(str(index)) for index in range(50)]
    assert {one.popularity for one in records} == {NEVER_USED}
    for one in records:
        popularity.used(one)
    assert sorted(records, key=lambda one: one.popularity) == records


def test_many_uses_count_more_until_they_are_long_ago() -> None:
    popularity, often, once, others = Popularity(10), record(), record(), record()
    for _ in range(4):
        popularity.used(often)
    popularity.used(once)
    assert often.popularity > once.popularity
    for _ in range(40):
        popularity.used(others)
    popularity.used(once)
    assert often.popularity < once.popularity, "four half-lives later four uses are worth less than one"


def test_popularity_stays_exact_for_ever() -> None:
    """Millions of half-lives later the difference between one use and two is still there."""
    popularity, one, two = Popularity(1e-6), record(), record()
    for _ in range(1000):
        popularity.used(record())
    popularity = Popularity(1e9)
    popularity._uses = 10**15
    popularity.used(one)
    popularity.used(two)
    popularity.used(two)
    assert two.popularity == pytest.approx(one.popularity + 1, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_least_popular_comes_first_whatever_happened_before(seed: int) -> None:
    rng = random.Random(seed)
    popularity, least_popular = Popularity(rng.choice([2, 30, 1000])), LeastPopularFirst()
    everyone = [record(str(index)) for index in range(40)]
    inside: list[Record] = []
    for _ in range(2000):
        match rng.randrange(4):
            case 0 if len(inside) < len(everyone):
                one = rng.choice([one for one in everyone if one not in inside])
                least_popular.add(one)
                inside.append(one)
            case 1 if inside:
                one = rng.choice(inside)
                least_popular.discard(one)
                inside.remove(one)
            case 2:
                popularity.used(rng.choice(everyone))
            case _:
                popped = least_popular.pop()
                # Of equally popular ones the first that came in: `inside` is in that order.
                expected = min(inside, key=lambda one: one.popularity, default=None)
                assert popped is expected
                if popped is not None:
                    inside.remove(popped)
        assert len(least_popular) == len(inside)
        assert set(least_popular) == set(inside)
    assert len(least_popular._heap) <= 64 + 2 * len(everyone)


def zipf(seed: int, *, drifting: bool) -> list[int]:
    """Adapters asked for by Zipf's law; drifting, the favourites change as time goes by."""
    rng = random.Random(seed)
    ranks = list(range(ADAPTERS))
    weights = [1 / (rank + 1) for rank in range(ADAPTERS)]
    asked: list[int] = []
    while len(asked) < REQUESTS:
        asked += rng.choices(ranks, weights, k=1000)
        if drifting:
            for _ in range(3):
                hot, other = rng.randrange(30), rng.randrange(ADAPTERS)
                ranks[hot], ranks[other] = ranks[other], ranks[hot]
    return asked


def hits_of_lru(asked: Sequence[int]) -> int:
    there: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for adapter in asked:
        hits += adapter in there
        there[adapter] = None
        there.move_to_end(adapter)
        if len(there) > SLOTS:
            there.popitem(last=False)
    return hits


def hits_by_popularity(asked: Sequence[int]) -> int:
    records = [record(str(index)) for index in range(ADAPTERS)]
    popularity, there = Popularity(16 * SLOTS), LeastPopularFirst()
    hits = 0
    for adapter in asked:
        one = records[adapter]
        hits += one in there
        popularity.used(one)
        if one not in there:
            if len(there) == SLOTS:
                there.pop()
            there.add(one)
    return hits


@pytest.mark.parametrize("drifting", [False, True], ids=["steady", "drifting"])
def test_more_hits_than_least_recently_used_on_zipf_traffic(drifting: bool) -> None:
    asked = zipf(1, drifting=drifting)
    lru, popularity = hits_of_lru(asked) / len(asked), hits_by_popularity(asked) / len(asked)
    print(f"\n{SLOTS} of {ADAPTERS} adapters, Zipf 1.0: LRU {lru:.1%}, by popularity {popularity:.1%} hits")
    assert popularity > lru + 0.08
