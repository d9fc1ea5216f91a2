"""The state of the server, starting, serving or draining, and the calls that it still owes an answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Iterator
from typing import TypeVar

from loraplex_server.api.requests.limits import Limits
from loraplex_server.api.text.adapter_tokenizers import AdapterTokenizers
from loraplex_server.api.text.chat.prompts import ChatPrompts
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core.errors import Reason, UnavailableError
from loraplex_server.wire.client import EngineClient

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Backend:
    """The engine that serves now, and what depends on it.

    Attributes:
        tokenizer: the base model's.
        tokenizers: those that adapters bring.
    """

    engine: EngineClient
    tokenizer: Tokenizer
    limits: Limits
    chat: ChatPrompts
    tokenizers: AdapterTokenizers


class Lifecycle:
    """Lets calls in while there is a backend, and counts those that are in."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._open = False
        self._refusal = UnavailableError(
            "the server is starting", retry_after_s=2.0, reason=Reason.SERVER_STARTING
        )
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()

    @property
    def backend(self) -> Backend:
        """Raises: UnavailableError before the engine is ready."""
        if self._backend is None:
            raise self._refusal
        return self._backend

    @property
    def serving(self) -> bool:
        """True while calls are let in."""
        return self._open

    @property
    def calls(self) -> int:
        """Calls running now."""
        return self._calls

    def serve(self, backend: Backend) -> None:
        """Lets calls in."""
        self._backend = backend
        self._open = True

    def suspend(self) -> None:
        """Refuses calls until `serve`: the engine is being started again."""
        self._open = False
        self._backend = None
        self._refusal = UnavailableError(
            "the engine is being started again", retry_after_s=2.0, reason=Reason.ENGINE_RESTARTING
        )

    def drain(self) -> None:
        """Refuses new calls; those that are in go on."""
        self._open = False
        self._refusal = UnavailableError(
            "the server is shutting down", retry_after_s=1.0, reason=Reason.SERVER_DRAINING
        )
        self._draining.set()

    async def until_draining(self, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
        """The items of `items`, which never ends by itself, until the server drains.

        Raises:
            UnavailableError: it does.
        """
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            async with contextlib.aclosing(items):
                while True:
                    following = asyncio.ensure_future(anext(items))
                    try:
                        await asyncio.wait({draining, following}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        if not following.done():
                            following.cancel()
                            await asyncio.gather(following, return_exceptions=True)
                    if following.cancelled():
                        raise self._refusal
                    yield following.result()
        finally:
            draining.cancel()

    async def wait_idle(self) -> None:
        """Returns once no call is running."""
        await self._idle.wait()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call from its arrival to its end.

        Raises:
            UnavailableError: the server is starting or draining.
        """
        if not self._open:
            raise self._refusal
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
