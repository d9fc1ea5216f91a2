"""The block pool under random use, its cache against a naive one, and the keys that name blocks' contents."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_server.engine.kv_blocks import KvBlockPool, block_key


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_keep_the_pool_whole(seed: int) -> None:
    rng = random.Random(seed)
    pool = KvBlockPool(20, 4)
    holders: list[list[int]] = []
    for _ in range(500):
        match rng.choice(["allocate", "share", "release", "key"]):
            case "allocate":
                count = rng.randint(0, 6)
                if count <= pool.num_free:
                    holders.append(pool.allocate(count))
                else:
                    with pytest.raises(ValueError, match="are free"):
                        pool.allocate(count)
            case "share" if holders:
                shared = list(rng.choice(holders))
                pool.retain(shared)
                holders.append(shared)
            case "release" if holders:
                pool.release(holders.pop(rng.randrange(len(holders))))
            case "key" if holders and (blocks := rng.choice(holders)):
                pool.set_key(blocks[0], pool.key(blocks[0]) or rng.randbytes(1))
        assert pool.check_integrity(holders) == []
        assert pool.num_used == len({block for blocks in holders for block in blocks})
    for blocks in holders:
        pool.release(blocks)
    assert pool.num_free == 20
    assert pool.check_integrity([]) == []
    pool.clear()
    assert all(pool.key(block) is None for block in range(20))


def test_misuse_is_refused() -> None:
    pool = KvBlockPool(4, 4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    for misuse in (pool.release, pool.retain):
        with pytest.raises(ValueError, match="is free"):
            misuse(blocks)
    with pytest.raises(ValueError, match="is free"):
        pool.set_key(blocks[0], b"key")


def test_integrity_names_what_is_wrong() -> None:
    pool = KvBlockPool(4, 4)
    held = pool.allocate(1)
    assert any("counts 1 references and has 0 holders" in line for line in pool.check_integrity([]))
    assert any("counts 1 references and has 2 holders" in line for line in pool.check_integrity([held, held]))


def test_a_key_depends_on_parent_tokens_and_namespace() -> None:
    keys = {
        block_key(parent, tokens, namespace)
        for parent in (b"", b"parent")
        for tokens in ([1, 2], [2, 1], [258])
        for namespace in (b"tenant a", b"tenant b")
    }
    assert len(keys) == 12
    assert block_key(b"", [1], b"n") == block_key(b"", [1], b"n")


# The prefix cache. A chain of keys is written as text: block i of "abc" has the key "abc"[: i + 1].


def hold(pool: KvBlockPool, chain: str) -> list[int]:
    """Blocks of a chain, as a sequence takes and names them."""
    keys = [chain[: end + 1].encode() for end in range(len(chain))]
    blocks = pool.take_cached(keys)
    blocks += pool.allocate(len(keys) - len(blocks))
    for block, key in zip(blocks, keys, strict=True):
        pool.set_key(block, key)
    return blocks


def cached(pool: KvBlockPool) -> list[str]:
    """The keys that can be had of blocks which nobody holds, the first to be evicted first."""
    return [(pool.key(block) or b"?").decode() for block in pool._cached]


def test_a_released_chain_is_found_again_and_its_leaves_are_evicted_first() -> None:
    pool = KvBlockPool(6, 4)
    blocks = hold(pool, "abcd")
    pool.release(blocks)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 4, 6)
    assert cached(pool) == ["abcd", "abc", "ab", "a"]
    other = hold(pool, "xyz")
    assert cached(pool) == ["abc", "ab", "a"]
    assert pool.take_cached([b"a", b"ab", b"abX"]) == blocks[:2]
    assert cached(pool) == ["abc"]
    pool.release(blocks[:2])
    pool.release(other)
    # What was used last is evicted last.
    assert cached(pool) == ["abc", "ab", "a", "xyz", "xy", "x"]
    assert pool.check_integrity([]) == []


def test_a_held_block_is_shared_and_never_evicted() -> None:
    pool = KvBlockPool(4, 4)
    first = hold(pool, "abc")
    assert hold(pool, "ab") == first[:2]
    pool.release(first)
    assert cached(pool) == ["abc"]
    assert len(pool.allocate(2)) == 2
    with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
        pool.allocate(1)
    assert pool.take_cached([b"a", b"ab", b"abc"]) == first[:2]


def test_of_two_blocks_with_one_content_the_first_has_the_name() -> None:
    pool = KvBlockPool(4, 4)
    first, second = pool.allocate(2)
    pool.set_key(first, b"k")
    pool.set_key(second, b"k")
    assert (pool.key(first), pool.key(second)) == (b"k", None)
    assert pool.check_integrity([[first, second]]) == []
    pool.release([first, second])
    assert (pool.num_cached, pool.num_free) == (1, 4)
    assert pool.take_cached([b"k"]) == [first]
    with pytest.raises(ValueError, match="has a key"):
        pool.set_key(first, b"another")


def test_integrity_covers_what_is_cached() -> None:
    pool = KvBlockPool(4, 4)
    block = hold(pool, "a")[0]
    pool._cached[block] = None
    assert "a KV block is cached and held" in pool.check_integrity([[block]])
    pool = KvBlockPool(4, 4)
    pool.release(hold(pool, "a"))
    del pool._by_key[b"a"]
    assert "keys and KV blocks do not name each other" in pool.check_integrity([])
    pool = KvBlockPool(4, 4)
    pool.release(hold(pool, "a"))
    pool._keys.clear()
    assert "a cached KV block has no key" in pool.check_integrity([])
    pool._cached.clear()
    assert any("neither held nor cached" in line for line in pool.check_integrity([]))


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(4, 12),
    steps=st.lists(st.tuples(st.booleans(), st.text("ab", min_size=1, max_size=5), st.integers(0, 99))),
)
def test_the_cache_behaves_as_a_naive_one(num_blocks: int, steps: list[tuple[bool, str, int]]) -> None:
    """The naive one: keys in a list by last use, searched from end to end."""
    pool = KvBlockPool(num_blocks, 4)
    holders: list[tuple[str, list[int]]] = []
    held: Counter[str] = Counter()
    waiting: list[str] = []
    for begin, chain, which in steps:
        keys = [chain[: end + 1] for end in range(len(chain))]
        if begin:
            there = next((n for n, key in enumerate(keys) if not held[key] and key not in waiting), len(keys))
            rest = [key for key in waiting if key not in keys[:there]]
            room = num_blocks - sum(count > 0 for count in held.values()) - len(waiting)
            missing = len(keys) - there
            if missing > room + len(rest):
                continue
            waiting = rest[max(0, missing - room) :]
            blocks = hold(pool, chain)
            held.update(keys)
            holders.append((chain, blocks))
        elif holders:
            chain, blocks = holders.pop(which % len(holders))
            pool.release(blocks)
            for end in range(len(chain), 0, -1):
                held[chain[:end]] -= 1
                if not held[chain[:end]]:
                    waiting.append(chain[:end])
        assert cached(pool) == waiting
        assert pool.check_integrity([blocks for _, blocks in holders]) == []
        known = {*waiting, *(key for key, count in held.items() if count)}
        assert all(key[:-1] in known for key in known if len(key) > 1), "a block is there without its parent"
