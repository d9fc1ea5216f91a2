"""The server process: wires the services to an engine, says when it is ready, and shuts down in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import signal
from pathlib import Path

from loraplex_server.api.address import address
from loraplex_server.api.engine_start import EngineStarter, LaunchEngine
from loraplex_server.api.restarts import RestartBudget
from loraplex_server.api.rpc.health import Health
from loraplex_server.api.rpc.listener import listen_grpc
from loraplex_server.api.security.authentication import Authenticator
from loraplex_server.api.security.exposure import asks_for_certificates, warn_of_exposure
from loraplex_server.api.services import make_services
from loraplex_server.api.telemetry.dashboard.port import MetricsPort
from loraplex_server.api.telemetry.tracing.start import start_tracing
from loraplex_server.config import ServerConfig
from loraplex_server.core.errors import FailedPreconditionError, ServerError
from loraplex_server.engine.process import launch_engine
from loraplex_server.wire.client import EngineClient

_log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1

# Calls beyond what may run and wait: health checks, adapter operations, and calls that get a proper refusal.
_SPARE_CALLS = 256
# For the last messages of calls that drained, or were cancelled, to leave.
_STOP_GRACE_S = 1.0
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(config: ServerConfig, launch: LaunchEngine = launch_engine) -> int:
    """Runs the server until a signal or the engine's death ends it; returns the exit code.

    The first SIGTERM or SIGINT drains: new calls get UNAVAILABLE, those that run have
    `config.api.drain_s`. The second ends everything at once. Afterwards both are ignored: the
    process is about to exit, and a late one must not make its exit code a death by signal.
    """
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in _END_SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        async with contextlib.AsyncExitStack() as stack:
            return await _Server(config, launch, stack).run(signals)
    except ServerError as error:
        _log.error("%s", error)
        return EXIT_FAILED
    finally:
        # Masked meanwhile, since asyncio puts the default handler back, which would kill the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
        for number in _END_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _END_SIGNALS)


class _Server:
    """The running parts of one server; `stack` ends them in the opposite order of their start."""

    def __init__(self, config: ServerConfig, launch: LaunchEngine, stack: contextlib.AsyncExitStack) -> None:
        api, version = config.api, _version()
        self._config = config
        self._stack = stack
        self._engine_stack = contextlib.AsyncExitStack()
        stack.push_async_exit(self._engine_stack)
        self._model_name = api.model_name or served_name(config.engine.model.model)
        self._health = Health()
        authenticator = Authenticator(api.token_file, certificates=asks_for_certificates(api))
        tracing = start_tracing(api.otlp_endpoint, self._model_name, version)
        # Pushed before anything that makes spans, so closed after it.
        stack.push_async_callback(tracing.close)
        self._services = make_services(authenticator, tracing, version)
        self._lifecycle = self._services.lifecycle
        self._metrics = self._services.metrics
        self._engines = EngineStarter(config, launch, self._metrics, version)

    async def run(self, signals: asyncio.Queue[int]) -> int:
        """From the first port to the last call; the exit code."""
        # Ports first: a taken one is found before a model is loaded, and probes can see it load.
        ports = await self._listen()
        stop = asyncio.create_task(signals.get())
        engine = await self._start_unless(stop)
        if engine is None:
            return EXIT_OK
        await self._health.set(serving=True)
        # The tokenizer's and torch's objects are here to stay; garbage collection need not visit them again.
        gc.freeze()
        self._stack.callback(gc.unfreeze)
        print(f"loraplex ready {ports}", flush=True)
        budget = RestartBudget(self._config.api.max_engine_restarts)
        while True:
            lost = asyncio.create_task(engine.wait_closed())
            await asyncio.wait({stop, lost}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                break
            pause_s = budget.take()
            if pause_s is None:
                stop.cancel()
                return await self._engine_lost()
            engine = await self._restart_engine(stop, pause_s)
            if engine is None:
                return EXIT_OK
        again = asyncio.create_task(signals.get())
        code = await self._drain(again, lost)
        # Before the ports close, so that calls that are cut off get the reason.
        await self._engine_stack.aclose()
        for task in (again, lost):
            task.cancel()
        return code

    async def _listen(self) -> str:
        """Opens the ports; says where they are."""
        api, scheduler = self._config.api, self._config.engine.scheduler
        max_calls = scheduler.max_queue + scheduler.max_num_requests + _SPARE_CALLS
        grpc_port = await listen_grpc(
            self._config,
            self._services,
            self._health,
            self._stack,
            max_calls=max_calls,
            stop_grace_s=_STOP_GRACE_S,
        )
        warn_of_exposure(api)
        http_port = await self._listen_http(max_calls)
        metrics_port = self._expose_metrics()
        metrics = "off" if metrics_port is None else address(api.metrics_host, metrics_port)
        http = "" if http_port is None else f" http={address(api.host, http_port)}"
        return f"grpc={address(api.host, grpc_port)} metrics={metrics}{http}"

    async def _listen_http(self, max_connections: int) -> int | None:
        """The HTTP port; None where it is not wanted."""
        api = self._config.api
        if api.http_port < 0:
            return None
        try:
            from loraplex_server.api.http.start import listen_http
        except ImportError as error:
            raise FailedPreconditionError(
                f"--http-port needs {error.name}, which is not installed; in a checkout: pip install ."
            ) from error
        return await listen_http(
            api,
            self._services,
            self._model_name,
            self._stack,
            max_connections=max_connections,
            stop_grace_s=_STOP_GRACE_S,
        )

    def _expose_metrics(self) -> int | None:
        """The metrics' port; None where it is not wanted."""
        api = self._config.api
        if api.metrics_port < 0:
            return None
        try:
            server = MetricsPort(api.metrics_host, api.metrics_port, self._metrics.registry)
        except OSError as error:
            where = address(api.metrics_host, api.metrics_port)
            raise FailedPreconditionError(
                f"metrics cannot listen on {where} ({error.strerror}); choose another --metrics-host or "
                "--metrics-port"
            ) from error
        self._stack.callback(server.close)
        return server.port

    async def _start_unless(self, stop: asyncio.Task[int]) -> EngineClient | None:
        """A running engine, with calls let in; None if `stop` came first."""
        start = asyncio.create_task(self._engines.start(self._engine_stack))
        await asyncio.wait({stop, start}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return None
        try:
            backend = start.result()
        except BaseException:
            stop.cancel()
            raise
        self._lifecycle.serve(backend)
        return backend.engine

    async def _restart_engine(self, stop: asyncio.Task[int], pause_s: float) -> EngineClient | None:
        """A new engine in the place of one that died; None if `stop` came first."""
        _log.error("the engine has died; it is started again in %g s", pause_s)
        self._lifecycle.suspend()
        await self._health.set(serving=False)
        await self._engine_stack.aclose()
        await asyncio.wait({stop}, timeout=pause_s)
        engine = None if stop.done() else await self._start_unless(stop)
        if engine is not None:
            await self._health.set(serving=True)
            self._metrics.observe_restart()
            _log.info("the engine serves again")
        return engine

    async def _drain(self, again: asyncio.Task[int], lost: asyncio.Task[None]) -> int:
        """Lets running calls finish, unless another signal or the engine's death comes first."""
        drain_s = self._config.api.drain_s
        _log.info("draining %d calls, for at most %g s", self._lifecycle.calls, drain_s)
        self._lifecycle.drain()
        await self._health.end()
        idle = asyncio.create_task(self._lifecycle.wait_idle())
        await asyncio.wait({idle, again, lost}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            idle.cancel()
            _log.warning("%d calls are cancelled", self._lifecycle.calls)
        return EXIT_FAILED if lost.done() else EXIT_OK

    async def _engine_lost(self) -> int:
        _log.error("the engine has died too often; the server ends")
        self._lifecycle.drain()
        await self._health.end()
        return EXIT_FAILED


def served_name(model: str) -> str:
    """The name of the base model for HTTP clients: a hub id as it is; of a folder the last part of its path.

    A symbolic link is not followed: it has the name that the operator wrote.
    """
    return Path(os.path.abspath(model)).name if Path(model).is_dir() else model


def _version() -> str:
    try:
        return importlib.metadata.version("loraplex")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
