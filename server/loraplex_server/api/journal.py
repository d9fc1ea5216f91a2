"""The adapter commands that a restarted engine has to be given again."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from loraplex_server.core.errors import ServerError
from loraplex_server.wire.client import EngineClient
from loraplex_server.wire.commands import (
    AdoptAdapter,
    Command,
    ComposeAdapter,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)

_log = logging.getLogger(__name__)


class AdapterJournal:
    """The adapter commands that took effect, as far as a new engine does not know of them from its start.

    Of each name the last registration counts, and whether it is pinned.
    """

    def __init__(self) -> None:
        self._registered: dict[str, LoadAdapter | ComposeAdapter] = {}
        self._uploaded: dict[str, None] = {}
        self._unloaded: dict[str, None] = {}
        self._pins: dict[str, bool] = {}

    def note(self, command: Command[Any]) -> None:
        """Takes in a command that succeeded."""
        match command:
            case LoadAdapter() | ComposeAdapter():
                self._register(command)
            case AdoptAdapter(name):
                self._forget(name)
                self._uploaded[name] = None
            case UnloadAdapter(name):
                self._forget(name)
                self._unloaded[name] = None
            case PinAdapter(name, pinned):
                self._pins[name] = pinned

    def _register(self, command: LoadAdapter | ComposeAdapter) -> None:
        pinned = self._pins.get(command.name)
        # At the end: the members of a composition have to come before it.
        self._forget(command.name)
        self._registered[command.name] = command
        if pinned is not None:
            self._pins[command.name] = pinned

    def _forget(self, name: str) -> None:
        for known in (self._registered, self._uploaded, self._unloaded, self._pins):
            known.pop(name, None)

    async def replay(self, engine: EngineClient) -> None:
        """Brings a new engine to where the old one was; what cannot be had again is logged."""
        if not (self._uploaded or self._unloaded or self._registered or self._pins):
            return
        known = {status.name for status in await engine.command(ListAdapters())}
        for name in self._uploaded:
            _log.error("adapter %r was uploaded and has to be sent again: the engine was restarted", name)
        for name in list(self._unloaded):
            if name in known:
                await _repeat(engine, name, UnloadAdapter(name))
        for name, command in list(self._registered.items()):
            await _repeat(engine, name, msgspec.structs.replace(command, inplace=name in known))
        for name, pinned in list(self._pins.items()):
            if name not in self._uploaded:
                await _repeat(engine, name, PinAdapter(name, pinned))


async def _repeat(engine: EngineClient, name: str, command: Command[Any]) -> None:
    try:
        await engine.command(command)
    except ServerError as error:
        _log.error("adapter %r is not what it was before the engine was restarted: %s", name, error)
