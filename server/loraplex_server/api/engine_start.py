"""Engines of one server: launched, connected to, and given the adapters that the one before had."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from loraplex_server.api.journal import AdapterJournal
from loraplex_server.api.lifecycle import Backend
from loraplex_server.api.requests.limits import Limits
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.text.adapter_tokenizers import AdapterTokenizers
from loraplex_server.api.text.chat.prompts import ChatPrompts
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.config import EngineConfig, ServerConfig
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.core.request_rules import RequestLimits
from loraplex_server.wire.client import EngineClient

_ENGINE_EXIT_S = 10.0


class EngineHandle(Protocol):
    """A launched engine: `engine.process.EngineProcess`, or what a test puts in its place."""

    socket_path: str
    token: str

    def wait_ready(self) -> None: ...

    def join(self, timeout_s: float) -> bool: ...

    def terminate(self) -> None: ...


LaunchEngine = Callable[[EngineConfig], EngineHandle]


class EngineStarter:
    """Starts one engine after another; each is given the adapters that the journal has from before."""

    def __init__(self, config: ServerConfig, launch: LaunchEngine, metrics: Metrics, version: str) -> None:
        self._config = config
        self._launch = launch
        self._metrics = metrics
        self._version = version
        self._journal = AdapterJournal()
        # Loaded once: another engine serves the same model.
        self._tokenizer: Tokenizer | None = None

    async def start(self, stack: contextlib.AsyncExitStack) -> Backend:
        """Launches an engine and, while it loads, the tokenizer; `stack` ends what was started.

        Raises:
            ServerError: the engine or the tokenizer cannot be loaded; the text says why.
        """
        handle = self._launch(self._config.engine)
        stack.push_async_callback(_end_engine, handle)
        tokenizer = await self._loaded(handle)
        engine = await EngineClient.connect(
            handle.socket_path,
            handle.token,
            self._journal.note,
            max_joined=self._config.api.max_tokens_per_message,
            max_unread=self._config.api.max_unread_tokens,
        )
        stack.push_async_callback(engine.shutdown)
        await self._journal.replay(engine)
        self._metrics.set_info(engine.info, self._version)
        engine.on_stats(self._metrics.observe_stats)
        limits = self._limits(engine, tokenizer)
        chat = ChatPrompts(engine, tokenizer, limits.max_prompt_chars)
        stack.push_async_callback(chat.close)
        tokenizers = AdapterTokenizers(tokenizer, limits.rules.vocab_size, lambda: engine.tokenizers)
        stack.push_async_callback(tokenizers.close)
        return Backend(engine, tokenizer, limits, chat, tokenizers)

    async def _loaded(self, handle: EngineHandle) -> Tokenizer:
        """Waits for the engine; the tokenizer, which is loaded meanwhile."""
        ready = asyncio.create_task(asyncio.to_thread(handle.wait_ready))
        loading = asyncio.create_task(asyncio.to_thread(self._load_tokenizer))
        try:
            await asyncio.gather(ready, loading)
        except BaseException:
            # The threads end with what they wait for; only then is there nothing left to report.
            await asyncio.to_thread(handle.terminate)
            await asyncio.gather(ready, loading, return_exceptions=True)
            raise
        return loading.result()

    def _load_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            model = self._config.engine.model.model
            try:
                self._tokenizer = Tokenizer.load(model)
            except (OSError, ValueError) as error:
                raise FailedPreconditionError(
                    f"the tokenizer of {model!r} cannot be loaded: {error}"
                ) from error
        return self._tokenizer

    def _limits(self, engine: EngineClient, tokenizer: Tokenizer) -> Limits:
        info, config = engine.info, self._config.engine
        return Limits(
            rules=RequestLimits(info.vocab_size, info.max_model_len, config.adapters.max_per_request),
            max_prompt_chars=info.max_model_len * tokenizer.max_chars_per_token,
            defaults=info.sampling_defaults,
            speculative_tokens=config.scheduler.speculative_tokens,
        )


async def _end_engine(handle: EngineHandle) -> None:
    """Waits for an engine that was told to end, and ends it if it does not."""
    if not await asyncio.to_thread(handle.join, _ENGINE_EXIT_S):
        await asyncio.to_thread(handle.terminate)
