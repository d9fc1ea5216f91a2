"""The state of an adapter and its movements between tiers, as the engine reports them."""

from __future__ import annotations

import msgspec


class AdapterStatus(msgspec.Struct, frozen=True, tag=True):
    """State of one adapter; fields as in `loraplex.v1.Adapter`, `state` in lower case."""

    name: str
    source: str
    state: str
    pinned: bool
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    bytes: int
    content_hash: str
    references: int
    draining: bool
    hits: int
    misses: int
    evictions: int


class AdapterChanges(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Adapters whose status has changed.

    Attributes:
        removed: names that no longer exist.
        all: `adapters` lists every adapter, as in the first message to a new watcher.
    """

    adapters: tuple[AdapterStatus, ...]
    removed: tuple[str, ...] = ()
    all: bool = False


class SwapRecord(msgspec.Struct, frozen=True, array_like=True):
    """One movement of an adapter: `kind` is "load" (disk to host), "copy" (host to device),
    "evict_device" or "evict_host"."""

    kind: str
    adapter: str
    seconds: float
    bytes: int
