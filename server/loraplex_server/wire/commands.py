"""Commands of the API to an engine, other than requests: a struct for each, which names its answer.

A command travels in a `Call` and is answered by a `Reply` with the same id.
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
        inplace: replace what is registered under the name.
    """

    name: str
    source: str
    inplace: bool = False


class ComposeAdapter(Command[AdapterStatus], frozen=True):
    """Makes one adapter of several by PEFT's recipe and registers it under `name`.

    Attributes:
        inplace: as in `LoadAdapter`.
    """

    name: str
    composition: Composition
    inplace: bool = False


class AdoptAdapter(Command[AdapterStatus], frozen=True):
    """Registers an adapter whose files a client has sent.

    Attributes:
        staged: folder, in the staging folder of the adapter cache, that holds the files.
        sha256: hex digest of each file, by the file's name.
        inplace: as in `LoadAdapter`.
    """

    name: str
    staged: str
    sha256: dict[str, str]
    inplace: bool = False


class UnloadAdapter(Command[tuple[AdapterStatus, ...]], frozen=True):
    """Drains and forgets an adapter; answered, once its memory is free, with the adapters that remain.

    Attributes:
        grace_s: seconds after which requests that still hold the adapter are ended; None lets them finish.
    """

    name: str
    grace_s: float | None = None


class ListAdapters(Command[tuple[AdapterStatus, ...]], frozen=True):
    """All adapters by name, those that drain included."""


class GetAdapter(Command[AdapterStatus], frozen=True):
    """One adapter."""

    name: str


class PinAdapter(Command[AdapterStatus], frozen=True):
    """Keeps an adapter on the device, or no longer; answered once it is there."""

    name: str
    pinned: bool = True


class PrefetchAdapters(Command[tuple[AdapterStatus, ...]], frozen=True):
    """A hint that adapters will be wanted; answered at once with their present state.

    Attributes:
        to_device: bring them to the device; False stops at host memory.
    """

    names: tuple[str, ...]
    to_device: bool = True


class GetChatTemplate(Command[str], frozen=True):
    """The chat template that an adapter brings; "" where it brings none."""

    name: str


class IntegrityReport(Message, frozen=True):
    """The state of the engine's pools.

    Attributes:
        problems: one line for each broken invariant; empty when all is well.
        weight_checksum: SHA-256 over the resident base weights, computed now.
    """

    problems: tuple[str, ...]
    running: int
    waiting: int
    kv_blocks_used: int
    adapter_references: int
    weight_checksum: str


class CheckIntegrity(Command[IntegrityReport], frozen=True):
    """Compares every pool with its holders, and the base weights with their checksum."""


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
    """A command with the id under which it is answered."""

    call_id: int
    command: AnyCommand


class Reply(Message, frozen=True):
    """The answer to a `Call`, of the type that its command names; or the error it ended with."""

    call_id: int
    answer: Answer | None = None
    error: ErrorInfo | None = None
