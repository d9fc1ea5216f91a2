"""The state of an adapter, and its movements between tiers, as the engine reports them."""

from __future__ import annotations

import msgspec


class AdapterStatus(msgspec.Struct, frozen=True, tag=True):
    """State of one adapter. Fields are those of `loraplex.v1.Adapter`; `state` is in lower case."""

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
    """A report to a watcher: the changes since the report before it.

    Attributes:
        adapters: the present state of each adapter that is new or has changed.
        removed: names that are not registered any more.
        all: True if `adapters` is the complete list, as in the first report.
    """

    adapters: tuple[AdapterStatus, ...]
    removed: tuple[str, ...] = ()
    all: bool = False


class SwapRecord(msgspec.Struct, frozen=True, array_like=True):
    """One movement of an adapter between tiers.

    Attributes:
        kind: "load" (disk to host), "copy" (host to device), "evict_device" or "evict_host".
    """

    kind: str
    adapter: str
    seconds: float
    bytes: int
