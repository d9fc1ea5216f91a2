"""The API's commands to an engine, other than requests. Each is a struct that names its answer's type.

A `Call` carries a command, and a `Reply` with the same id answers it.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.composition import Composition
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.wire.message import Message

AnswerT = TypeVar("AnswerT")


class Command(Message, Generic[AnswerT], frozen=True):
    """Base of all commands; a subclass names the type of its answer."""


class LoadAdapter(Command[AdapterStatus], frozen=True):
    """Fetches an adapter, registers it under `name` and brings it to host memory.

    Attributes:
        source: a folder that PEFT wrote, or the address of one.
        inplace: replace the adapter that is registered under the name, if there is one.
    """

    name: str
    source: str
    inplace: bool = False


class ComposeAdapter(Command[AdapterStatus], frozen=True):
    """Composes several adapters by PEFT's recipe and registers the result under `name`.

    Attributes:
        inplace: as in `LoadAdapter`.
    """

    name: str
    composition: Composition
    inplace: bool = False


class AdoptAdapter(Command[AdapterStatus], frozen=True):
    """Registers an adapter whose files a client has uploaded.

    Attributes:
        staged: name of the folder with the files, in the staging folder of the adapter cache.
        sha256: hex digest of each file, by the file's name.
        inplace: as in `LoadAdapter`.
    """

    name: str
    staged: str
    sha256: dict[str, str]
    inplace: bool = False


class UnloadAdapter(Command[tuple[AdapterStatus, ...]], frozen=True):
    """Drains and unregisters an adapter. The reply comes when its memory is free: the remaining adapters.

    Attributes:
        grace_s: seconds after which the requests that still use the adapter are ended; None lets them finish.
    """

    name: str
    grace_s: float | None = None


class ListAdapters(Command[tuple[AdapterStatus, ...]], frozen=True):
    """Lists all adapters by name, draining ones included."""


class GetAdapter(Command[AdapterStatus], frozen=True):
    """Asks for the state of one adapter."""

    name: str


class PinAdapter(Command[AdapterStatus], frozen=True):
    """Pins an adapter to the device, or removes its pin. A pin is answered when the adapter is there."""

    name: str
    pinned: bool = True


class PrefetchAdapters(Command[tuple[AdapterStatus, ...]], frozen=True):
    """A hint that requests will soon use these adapters. The reply comes at once, with their present state.

    Attributes:
        to_device: load them to the device; False loads them to host memory only.
    """

    names: tuple[str, ...]
    to_device: bool = True


class GetChatTemplate(Command[str], frozen=True):
    """Asks for the adapter's own chat template; "" if it has none."""

    name: str


class IntegrityReport(Message, frozen=True):
    """The state of the engine's pools.

    Attributes:
        problems: one line for each broken invariant; empty if there is none.
        running: number of running requests.
        waiting: number of waiting requests.
        kv_blocks_used: KV blocks that requests hold.
        adapter_references: references that requests hold on adapters.
        weight_checksum: SHA-256 over the resident base weights, computed for this report.
    """

    problems: tuple[str, ...]
    running: int
    waiting: int
    kv_blocks_used: int
    adapter_references: int
    weight_checksum: str


class CheckIntegrity(Command[IntegrityReport], frozen=True):
    """Asks for an audit: every pool against its holders, and the base weights against their checksum."""


AnyCommand = (
    LoadAdapter
    | ComposeAdapter
    | AdoptAdapter
    | UnloadAdapter
    | ListAdapters
    | GetAdapter
    | PinAdapter
    | PrefetchAdapters
    | GetChatTemplate
    | CheckIntegrity
)

Answer = AdapterStatus | tuple[AdapterStatus, ...] | str | IntegrityReport


class Call(Message, frozen=True):
    """A command, with the id that its reply will have."""

    call_id: int
    command: AnyCommand


class Reply(Message, frozen=True):
    """The reply to a `Call`: an answer of the type that its command names, or an error."""

    call_id: int
    answer: Answer | None = None
    error: ErrorInfo | None = None
