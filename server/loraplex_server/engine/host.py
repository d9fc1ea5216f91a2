"""The engine as a server: one loop that steps it, takes up what its clients say, and tells them.

The loop owns the engine; the connections' threads touch only queues. It runs in a process of its own
(`engine/process.py`), or in a thread for unit tests.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time

from loraplex_server.core.adapter_status import AdapterChanges
from loraplex_server.core.errors import InternalError, ServerError
from loraplex_server.engine.commands import execute
from loraplex_server.engine.connections import Connected, Connection, Event, Gone, Listener, Received
from loraplex_server.engine.engine import Engine
from loraplex_server.wire.commands import Answer, Call, Reply
from loraplex_server.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Failed,
    FromEngine,
    Hello,
    Shutdown,
    Submit,
    ToEngine,
    TokenizersChanged,
    UnwatchAdapters,
    WatchAdapters,
    Welcome,
)

_log = logging.getLogger(__name__)

_STATS_EVERY_S = 0.1
"""Often enough for a display that moves; ten messages a second cost nothing beside the tokens."""

_IDLE_S = 0.5
"""Longest sleep of an idle loop; whatever there is to do wakes it before."""


class EngineHost:
    """Serves one engine: `run` it until a client says `Shutdown` or `stop` is called."""

    def __init__(self, socket_path: str, token: str) -> None:
        # None only wakes.
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._listener = Listener(socket_path, token, self._events.put)
        self._clients: dict[str, Connection] = {}
        # Clients that want to know what changes with the adapters.
        self._watchers: set[str] = set()
        self._stopping = False
        self._last_stats_s = 0.0

    def emit(self, client: str, message: FromEngine) -> None:
        """Sends a message to a client; one that is gone gets nothing."""
        if (found := self._clients.get(client)) is not None:
            found.send(message)

    def wake(self) -> None:
        """Makes an idle loop look again; may be called from any thread."""
        self._events.put(None)

    def stop(self) -> None:
        """Ends `run` after the step at hand; may be called from any thread."""
        self._stopping = True
        self.wake()

    def run(self, engine: Engine) -> None:
        """Accepts clients and steps the engine until told to stop. The caller's thread owns the engine."""
        self._listener.start()
        try:
            busy = False
            while not self._stopping:
                self._handle_events(engine, wait=not busy)
                progressed = engine.step()
                self._send_tokenizers(engine)
                busy = progressed or engine.idle()
                self._send_stats(engine, idle=not progressed)
        finally:
            self._listener.close()
            for client in self._clients.values():
                client.close()
            for client in self._clients.values():
                client.join()
            engine.adapters.close()

    def _handle_events(self, engine: Engine, *, wait: bool) -> None:
        """Handles all that has come in; waits for something first if there is nothing to step."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=_IDLE_S) if wait else self._events.get_nowait()
            while True:
                self._handle(engine, event)
                event = self._events.get_nowait()

    def _handle(self, engine: Engine, event: Event | None) -> None:
        match event:
            case None:
                pass
            case Connected(client):
                self._clients[client.id] = client
                client.send(Welcome(PROTOCOL_VERSION, engine.info, engine.adapters.registry.tokenizers.known))
            case Gone(client_id):
                engine.cancel_client(client_id)
                self._unwatch(engine, client_id)
                if (gone := self._clients.pop(client_id, None)) is not None:
                    gone.close()
            case Received(client_id, message):
                try:
                    self._obey(engine, client_id, message)
                except Exception as error:
                    _log.exception("a %s message failed", type(message).__name__)
                    self._refuse(client_id, message, InternalError(f"it failed: {type(error).__name__}"))

    def _obey(self, engine: Engine, client: str, message: ToEngine) -> None:
        match message:
            case Submit(request):
                engine.submit(client, request)
            case Cancel(request_id):
                engine.cancel(client, request_id)
            case Call(call_id, command):
                execute(engine, command, lambda answer: self._reply(engine, client, call_id, answer))
            case WatchAdapters():
                self._watch(engine, client)
            case UnwatchAdapters():
                self._unwatch(engine, client)
            case Shutdown():
                self._stopping = True
            case Hello():
                _log.warning("client %s said hello twice", client)

    def _refuse(self, client: str, message: ToEngine, error: InternalError) -> None:
        """Answers a message that met a fault of ours, so that nobody waits for its answer."""
        match message:
            case Submit(request):
                self.emit(client, Failed(request.request_id, error.info))
            case Call(call_id):
                self.emit(client, Reply(call_id, error=error.info))

    def _reply(self, engine: Engine, client: str, call_id: int, answer: Answer | ServerError) -> None:
        # Who hears that an adapter is there may send text for it at once.
        self._send_tokenizers(engine)
        if isinstance(answer, ServerError):
            self.emit(client, Reply(call_id, error=answer.info))
        else:
            self.emit(client, Reply(call_id, answer))

    def _watch(self, engine: Engine, client: str) -> None:
        """Tells a client of all adapters, and from now on of changes."""
        self._send_changes(engine)
        self._watchers.add(client)
        engine.adapters.registry.changes.watch(True)
        self.emit(client, AdapterChanges(tuple(engine.adapters.registry.statuses()), all=True))

    def _unwatch(self, engine: Engine, client: str) -> None:
        if client in self._watchers:
            self._watchers.remove(client)
            if not self._watchers:
                engine.adapters.registry.changes.watch(False)

    def _send_tokenizers(self, engine: Engine) -> None:
        changed = engine.adapters.registry.tokenizers.drain()
        if changed:
            for client in self._clients.values():
                client.send(TokenizersChanged(changed))

    def _send_changes(self, engine: Engine) -> None:
        if self._watchers:
            changes = engine.adapters.registry.changes.drain()
            if changes.adapters or changes.removed:
                for client in self._watchers:
                    self.emit(client, changes)

    def _send_stats(self, engine: Engine, *, idle: bool) -> None:
        now_s = time.monotonic()
        if now_s - self._last_stats_s >= _STATS_EVERY_S or idle:
            self._last_stats_s = now_s
            self._send_changes(engine)
            stats = engine.stats()
            for client in self._clients.values():
                client.send(stats)
