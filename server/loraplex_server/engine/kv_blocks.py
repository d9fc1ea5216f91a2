"""The pool of KV cache blocks: reference counts, and a key for every full block."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence


def block_key(parent: bytes, token_ids: Sequence[int], namespace: bytes) -> bytes:
    """Identity of a full block's content: what came before it, its tokens, and whose it is.

    `namespace` names the tenant and the adapters with their weights, so equal tokens of two tenants
    or two adapters never have one key.
    """
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(len(namespace).to_bytes(4, "little") + namespace)
    digest.update(b"".join(token.to_bytes(4, "little", signed=True) for token in token_ids))
    return digest.digest()


class KvBlockPool:
    """Blocks by index, handed out and taken back. No tensor lives here.

    A block is free (reference count 0) or held. `allocate` gives a block a count of 1, `retain` adds
    one, `release` takes one away; at 0 the block is free again and its key is forgotten.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks.

        Raises:
            ValueError: fewer are free; nothing is taken then.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder for each block, all of which are held already."""
        for block in blocks:
            if not self._references[block]:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each block."""
        for block in blocks:
            if not self._references[block]:
                raise ValueError(f"block {block} is free already")
            self._references[block] -= 1
            if not self._references[block]:
                self._keys.pop(block, None)
                self._free.append(block)

    def set_key(self, block: int, key: bytes) -> None:
        """Names the content of a held, full block."""
        if not self._references[block]:
            raise ValueError(f"block {block} is free and has no content")
        self._keys[block] = key

    def key(self, block: int) -> bytes | None:
        """The content's name, None while the block is free or not full."""
        return self._keys.get(block)

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> list[str]:
        """A line for each way in which the pool and the holders' block tables disagree."""
        problems = []
        held = Counter(block for table in block_tables for block in table)
        for block, references in enumerate(self._references):
            if references != held[block]:
                problems.append(
                    f"KV block {block} counts {references} references and has {held[block]} holders"
                )
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("a KV block is on the free list twice")
        if free != {block for block, references in enumerate(self._references) if not references}:
            problems.append("the free list of KV blocks is not the set of blocks without references")
        if not self._keys.keys().isdisjoint(free):
            problems.append("a free KV block still has a key")
        return problems
