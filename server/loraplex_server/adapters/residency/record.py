"""One version of an adapter, as the store and its tiers keep it, and one request's handle to it."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.errors import ServerError

if TYPE_CHECKING:
    # The scheduler knows handles, and must not need torch for it.

    from loraplex_kernels.pool import AdapterLayout
    from loraplex_server.adapters.files.weights import HostBlob
    from loraplex_server.adapters.spec.manifest import AdapterManifest

StatusCallback = Callable[[AdapterStatus | ServerError], None]


class AdapterState(enum.StrEnum):
    """Places of an adapter; names as in `loraplex.v1.AdapterState`."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    HOST = "host"
    COPYING = "copying"
    DEVICE = "device"


class Readiness(enum.Enum):
    """Answers to a request that wants its adapters.

    READY: all are on the device. LOADING: room is set aside, ask `is_ready` after the next `poll`. BLOCKED:
    there is no room now and nothing is held, reserve again later. FAILED: see `Requests.failure`.
    """

    READY = "ready"
    LOADING = "loading"
    BLOCKED = "blocked"
    FAILED = "failed"


@dataclasses.dataclass(eq=False)
class Record:
    """One version of an adapter. Only the store and its parts change it, on one thread.

    Attributes:
        units: elements of the device arena that it takes, padding included.
        host_bytes: bytes of its host copy.
        content_hash: "" until the weights were first read.
        blob: the host copy. By the host tier.
        reading: a worker reads it, its host bytes are set aside. By the host tier.
        slot: its row of the pool's tables, None without room on the device. By the device tier.
        start: first element of its extent, if it has a slot. By the device tier.
        copying: a worker fills its extent.
        resident: its extent is filled and its slot points there. By the device tier.
        draining: unloaded or replaced, and still held.
        retired: no longer registered; freed when nobody holds it.
        hint: number of the prefetch hint that named it last, 0 once a request has used it.
        error: why this version will never be served.
        popularity: how much it is asked for; see `popularity`.
        references: of requests, from admission to their end.
        device_references: of requests that run, or wait with room set aside.
    """

    name: str
    source: str
    manifest: AdapterManifest
    layout: AdapterLayout
    units: int
    host_bytes: int
    content_hash: str = ""
    blob: HostBlob | None = None
    reading: bool = False
    slot: int | None = None
    start: int = 0
    copying: bool = False
    resident: bool = False
    pinned: bool = False
    draining: bool = False
    retired: bool = False
    hint: int = 0
    error: ServerError | None = None
    popularity: float = -math.inf
    references: int = 0
    device_references: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    on_loaded: StatusCallback | None = None
    on_pinned: list[StatusCallback] = dataclasses.field(default_factory=list)
    on_drained: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    @property
    def state(self) -> AdapterState:
        if self.resident:
            return AdapterState.DEVICE
        if self.copying:
            return AdapterState.COPYING
        if self.blob is not None:
            return AdapterState.HOST
        return AdapterState.LOADING if self.reading else AdapterState.UNLOADED

    @property
    def origin(self) -> tuple[object, ...]:
        """Content and source; another version of its name differs in one of them."""
        manifest = self.manifest
        return self.content_hash, self.source, manifest.folder, manifest.chat_template, manifest.tokenizer

    @property
    def wanted_on_device(self) -> bool:
        """True if it must not leave the device."""
        return self.pinned or self.device_references > 0

    @property
    def irreplaceable(self) -> bool:
        """True if what memory has may be all there is of it: its files may be gone, or another version's."""
        return self.retired and self.references > 0

    @property
    def busy(self) -> bool:
        """True if a worker reads or copies it."""
        return self.reading or self.copying

    def status(self) -> AdapterStatus:
        return AdapterStatus(
            name=self.name,
            source=self.source,
            state=self.state.value,
            pinned=self.pinned,
            peft_type=self.manifest.peft_type,
            rank=self.manifest.rank,
            target_modules=self.manifest.target_modules,
            bytes=self.host_bytes,
            content_hash=self.content_hash,
            references=self.references,
            draining=self.draining,
            hits=self.hits,
            misses=self.misses,
            evictions=self.evictions,
        )


class AdapterHandle:
    """One request's reference to one version of an adapter.

    Made by `Requests.resolve` and ended by `release`; only the store looks inside.

    Attributes:
        group: the versions that the request named together.
        reserved: it holds a device reference.
        counted: its hit or miss was counted.
    """

    __slots__ = ("counted", "group", "record", "reserved")

    def __init__(self, record: Record, group: tuple[Record, ...]) -> None:
        self.record = record
        self.group = group
        self.reserved = False
        self.counted = False

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def resident(self) -> bool:
        """True if it is on the device, held there or not."""
        return self.record.resident

    @property
    def content_hash(self) -> str:
        """Identity of weights and configuration; "" until they were first read, always set once READY."""
        return self.record.content_hash

    @property
    def draining(self) -> bool:
        """True if the adapter, or this version of it, was taken away from new requests."""
        return self.record.draining

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of a soft prompt or a prefix, which stand before the prompt."""
        return self.record.manifest.num_virtual_tokens

    @property
    def added_tokens(self) -> int:
        """The number of token ids that it adds to the base's vocabulary."""
        return self.record.manifest.added_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """The virtual tokens that need no computing: their keys and values come with the adapter."""
        return self.record.manifest.num_prefix_tokens

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """Token ids from which on an activated LoRA applies; empty where it applies everywhere."""
        return self.record.manifest.invocation_tokens

    def __repr__(self) -> str:
        return f"AdapterHandle({self.name!r}, reserved={self.reserved})"


def unread_status(name: str, source: str) -> AdapterStatus:
    """The status of an adapter whose files are just being looked at."""
    return AdapterStatus(
        name=name,
        source=source,
        state=AdapterState.LOADING.value,
        pinned=False,
        peft_type="",
        rank=0,
        target_modules=(),
        bytes=0,
        content_hash="",
        references=0,
        draining=False,
        hits=0,
        misses=0,
        evictions=0,
    )
