"""The pool of KV cache blocks: reference counts, a key for every full block, and so a prefix cache."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def block_key(parent: bytes, token_ids: Sequence[int], namespace: bytes) -> bytes:
    """Identity of a full block's content: what came before it, its tokens, and whose it is.

    `namespace` names the tenant and the adapters with their weights, so equal tokens of two tenants
    or two adapters never have one key.
    """
    tokens = struct.pack(f"<{len(token_ids)}i", *token_ids)
    content = b"".join((parent, len(namespace).to_bytes(4, "little"), namespace, tokens))
    return hashlib.blake2b(content, digest_size=16).digest()


class KvBlockPool:
    """Blocks by index, handed out and taken back. No tensor lives here.

    A block is held (it has references), cached (it has none, and a key by which its content can be had
    again) or free. `allocate` gives a block a count of 1, `retain` adds one, `release` takes one away; at 0
    a block with a key is cached and one without is free. Cached blocks are room like free ones: `allocate`
    takes them when no free ones are left, the least recently used first, and their keys with them.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        # In order of last use; a plain dictionary is slow to find its first after many were taken away.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can be had again."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of no content; free ones, then the cached ones that were used least recently.

        Raises:
            ValueError: there are fewer; nothing is taken then.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder for each block, all of which are held or cached already."""
        for block in blocks:
            if not self._references[block]:
                if block not in self._cached:
                    raise ValueError(f"block {block} is free and cannot be shared")
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a sequence, given in the order of positions."""
        # The last first, so that it is evicted before those without which it cannot be found.
        for block in reversed(blocks):
            if not self._references[block]:
                raise ValueError(f"block {block} is free already")
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._keys:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def has(self, key: bytes) -> bool:
        """True if `take_cached` would find that block, after those before it."""
        return key in self._by_key

    def take_cached(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of `keys` that is there, held or cached; retains them."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        self.retain(found)
        return found

    def set_key(self, block: int, key: bytes) -> None:
        """Names the content of a held, full block, by which `take_cached` finds it from now on.

        Of two blocks with one content (computed side by side) the first alone has the name.
        """
        if not self._references[block]:
            raise ValueError(f"block {block} is free and has no content")
        if self._keys.get(block, key) != key:
            raise ValueError(f"block {block} is full and has a key")
        if key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def key(self, block: int) -> bytes | None:
        """The content's name, None while the block is free or not full, or another has that name."""
        return self._keys.get(block)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Takes the names of these contents away, those that are there: nobody finds them any more."""
        for key in keys:
            block = self._by_key.pop(key, None)
            if block is not None:
                del self._keys[block]
                if block in self._cached:
                    del self._cached[block]
                    self._free.append(block)

    def clear(self) -> int:
        """Forgets all cached blocks, which are free then. Returns how many."""
        count = len(self._cached)
        self._free += [self._evict() for _ in range(count)]
        return count

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._by_key[self._keys.pop(block)]
        return block

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
        unused = {block for block, references in enumerate(self._references) if not references}
        if free != unused - self._cached.keys():
            problems.append(
                "the free list of KV blocks is not the set of blocks that are neither held nor cached"
            )
        if not self._cached.keys() <= unused:
            problems.append("a KV block is cached and held")
        if not self._cached.keys() <= self._keys.keys():
            problems.append("a cached KV block has no key")
        if not self._keys.keys().isdisjoint(free):
            problems.append("a free KV block still has a key")
        if self._by_key != {key: block for block, key in self._keys.items()}:
            problems.append("keys and KV blocks do not name each other")
        return problems
