"""A request as the engine works on it: tokens known, tokens computed, and what it holds."""

from __future__ import annotations

import dataclasses
import enum
import time

from loraplex_server.adapters.record import AdapterHandle
from loraplex_server.core.request import Request
from loraplex_server.engine.kv_blocks import block_key

EFFECT_VERSION = 1
"""Grows when what an adapter's bytes mean for keys and values changes."""

Composition = tuple[tuple[AdapterHandle, float], ...]


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine. The scheduler owns `status`, `block_table` and `reserved`.

    Attributes:
        client: connection that submitted the request.
        handles: its adapters, resolved, in the request's order.
        token_ids: prompt and generated tokens known so far.
        num_computed: how many of them have their keys and values in the cache.
        block_table: KV blocks it holds, in the order of positions.
        block_keys: keys of its full blocks; one shorter than or as long as the full part of the table.
        reserved: it holds device references to its adapters.
    """

    request: Request
    client: str
    handles: tuple[AdapterHandle, ...]
    arrival_s: float = dataclasses.field(default_factory=time.monotonic)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    status: Status = Status.WAITING
    block_table: list[int] = dataclasses.field(default_factory=list)
    block_keys: list[bytes] = dataclasses.field(default_factory=list)
    reserved: bool = False
    preemptions: int = 0
    adapter_wait_start_s: float | None = None
    adapter_wait_s: float = 0.0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    _composition: Composition = ()

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        weights = (use.weight for use in self.request.adapters)
        self._composition = tuple(zip(self.handles, weights, strict=True))

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens known and not yet computed: 1 when decoding, more when prefilling."""
        return len(self.token_ids) - self.num_computed

    def adapters_at(self, position: int) -> Composition:
        """The adapters, with weights, that apply to the token at `position`.

        An adapter belongs to a token, not to a request: kinds that begin at an invocation sequence
        answer differently along the row.
        """
        del position
        return self._composition

    @property
    def adapter_changes(self) -> tuple[int, ...]:
        """Positions, ascending, at which `adapters_at` begins to answer otherwise than before them."""
        return ()

    @property
    def namespace(self) -> bytes:
        """Whose KV this is: the tenant, and content and weight of each adapter in order."""
        parts = [self.request.tenant]
        parts += [
            f"{handle.content_hash}@{use.weight!r}@{EFFECT_VERSION}"
            for handle, use in zip(self.handles, self.request.adapters, strict=True)
        ]
        return "\0".join(parts).encode()

    def new_block_keys(self, block_size: int) -> list[tuple[int, bytes]]:
        """(block, key) of each block that became full since the last call."""
        fresh = []
        namespace = b""
        while len(self.block_keys) < self.num_computed // block_size:
            namespace = namespace or self.namespace
            index = len(self.block_keys)
            parent = self.block_keys[-1] if self.block_keys else b""
            tokens = self.token_ids[index * block_size : (index + 1) * block_size]
            self.block_keys.append(block_key(parent, tokens, namespace))
            fresh.append((self.block_table[index], self.block_keys[-1]))
        return fresh
