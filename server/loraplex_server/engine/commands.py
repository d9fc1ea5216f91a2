"""Commands of clients, each carried out by what it is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from loraplex_server.core.errors import ServerError
from loraplex_server.engine.engine import Engine
from loraplex_server.wire.commands import (
    AdoptAdapter,
    Answer,
    AnyCommand,
    CheckIntegrity,
    ComposeAdapter,
    GetAdapter,
    GetChatTemplate,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapters,
    UnloadAdapter,
)


def execute(engine: Engine, command: AnyCommand, reply: Callable[[Answer | ServerError], None]) -> None:
    """Carries out a command; `reply` gets its answer or its error, once, now or in a later step."""
    adapters = engine.adapters
    try:
        match command:
            case LoadAdapter(name, source, inplace):
                adapters.intake.load(name, source, reply, inplace=inplace)
            case ComposeAdapter(name, composition, inplace):
                adapters.intake.compose(name, composition, reply, inplace=inplace)
            case AdoptAdapter(name, staged, sha256, inplace):
                adapters.intake.adopt(name, Path(staged), sha256, reply, inplace=inplace)
            case UnloadAdapter(name, grace_s):
                engine.unload(name, grace_s, lambda: reply(tuple(adapters.registry.statuses())))
            case ListAdapters():
                reply(tuple(adapters.registry.statuses()))
            case GetAdapter(name):
                reply(adapters.registry.status(name))
            case PinAdapter(name, pinned):
                adapters.pin(name, pinned, reply)
            case PrefetchAdapters(names, to_device):
                reply(tuple(adapters.prefetch(names, to_device=to_device)))
            case GetChatTemplate(name):
                reply(adapters.chat_template(name))
            case CheckIntegrity():
                reply(engine.check_integrity())
            case _:
                assert_never(command)
    except ServerError as error:
        reply(error)
