"""The block pool under random use, and the keys that name blocks' contents."""

from __future__ import annotations

import random

import pytest

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
