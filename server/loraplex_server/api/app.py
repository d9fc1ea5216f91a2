"""The server process: wires the services to an engine, says when it is ready, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from loraplex_server.api.answers.generator import Generator
from loraplex_server.api.answers.stalls import StallWatch
from loraplex_server.api.lifecycle import Backend, Lifecycle
from loraplex_server.api.requests.convert import Limits
from loraplex_server.api.requests.uploads import UploadDesk
from loraplex_server.api.restarts import AdapterJournal, RestartBudget
from loraplex_server.api.rpc.adapter_service import AdapterService
from loraplex_server.api.rpc.generation_service import GenerationService
from loraplex_server.api.rpc.interceptors import CallInterceptor
from loraplex_server.api.rpc.model_service import ModelService
from loraplex_server.api.security import tls
from loraplex_server.api.security.authentication import Authenticator
from loraplex_server.api.telemetry.dashboard.port import MetricsPort
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import NoTracing, Tracing
from loraplex_server.api.text.adapter_tokenizers import AdapterTokenizers
from loraplex_server.api.text.chat.prompts import ChatPrompts
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.config import ApiConfig, EngineConfig, ServerConfig, is_loopback
from loraplex_server.core.errors import FailedPreconditionError, ServerError
from loraplex_server.wire.client import EngineClient

_log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1

_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
# Calls beyond what may run and wait: health checks, adapter operations, and those to be refused kindly.
_SPARE_CALLS = 256
# For the last messages of calls that drained, or were cancelled, to leave.
_STOP_GRACE_S = 1.0
_ENGINE_EXIT_S = 10.0
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EngineHandle(Protocol):
    """A launched engine: `engine.process.EngineProcess`, or what a test puts in its place."""

    socket_path: str
    token: str

    def wait_ready(self) -> None: ...

    def join(self, timeout_s: float) -> bool: ...

    def terminate(self) -> None: ...


LaunchEngine = Callable[[EngineConfig], EngineHandle]


def launch_process(config: EngineConfig) -> EngineHandle:
    """An engine in a process of its own."""
    from loraplex_server.engine.process import launch_engine

    return launch_engine(config)


async def serve(config: ServerConfig, launch: LaunchEngine = launch_process) -> int:
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
            return await _Server(config, stack).run(launch, signals)
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
    """What was started, in the order it was; `stack` ends it in the opposite one."""

    def __init__(self, config: ServerConfig, stack: contextlib.AsyncExitStack) -> None:
        self._config = config
        self._stack = stack
        self._engine_stack = contextlib.AsyncExitStack()
        stack.push_async_exit(self._engine_stack)
        self._journal = AdapterJournal()
        self._tokenizer: Tokenizer | None = None
        self._lifecycle = Lifecycle()
        self._metrics = Metrics()
        self._health = health.aio.HealthServicer()
        self._version = _version()
        api = config.api
        self._certificates = api.tls is not None and api.tls.client_ca is not None
        self._authenticator = Authenticator(api.token_file, certificates=self._certificates)
        self._tracing = _tracing(api.otlp_endpoint, self._model_name, self._version)
        # After all that there may be spans of.
        stack.push_async_callback(self._tracing.close)
        self._generator = Generator(self._lifecycle, self._metrics, self._tracing)

    async def run(self, launch: LaunchEngine, signals: asyncio.Queue[int]) -> int:
        # Ports first: a taken one is found before a model is loaded, and probes can see it load.
        grpc_port = await self._listen()
        http_port = await self._listen_http()
        metrics_port = self._expose_metrics()
        stop = asyncio.create_task(signals.get())
        engine = await self._start_unless(stop, launch)
        if engine is None:
            return EXIT_OK
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        # The tokenizer's and torch's objects are here to stay; collections need not look at them again.
        gc.freeze()
        self._stack.callback(gc.unfreeze)
        api = self._config.api
        metrics = "off" if metrics_port is None else _address(api.metrics_host, metrics_port)
        http = "" if http_port is None else f" http={_address(api.host, http_port)}"
        print(f"loraplex ready grpc={_address(api.host, grpc_port)} metrics={metrics}{http}", flush=True)

        budget = RestartBudget(api.max_engine_restarts)
        while True:
            lost = asyncio.create_task(engine.wait_closed())
            await asyncio.wait({stop, lost}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                break
            pause_s = budget.take()
            if pause_s is None:
                stop.cancel()
                return await self._engine_lost()
            engine = await self._restart_engine(stop, launch, pause_s)
            if engine is None:
                return EXIT_OK
        again = asyncio.create_task(signals.get())
        code = await self._drain(again, lost)
        # Before the ports close: so calls that are cut off are told why.
        await self._engine_stack.aclose()
        for task in (again, lost):
            task.cancel()
        return code

    async def _start_unless(self, stop: asyncio.Task[int], launch: LaunchEngine) -> EngineClient | None:
        """A running engine; None if `stop` came first."""
        start = asyncio.create_task(self._start_engine(launch))
        await asyncio.wait({stop, start}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return None
        try:
            return start.result()
        except BaseException:
            stop.cancel()
            raise

    async def _restart_engine(
        self, stop: asyncio.Task[int], launch: LaunchEngine, pause_s: float
    ) -> EngineClient | None:
        """A new engine in the place of one that died; None if `stop` came first."""
        _log.error("the engine has died; it is started again in %g s", pause_s)
        self._lifecycle.suspend()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._engine_stack.aclose()
        await asyncio.wait({stop}, timeout=pause_s)
        engine = None if stop.done() else await self._start_unless(stop, launch)
        if engine is not None:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            self._metrics.observe_restart()
            _log.info("the engine serves again")
        return engine

    async def _listen(self) -> int:
        """Starts the gRPC server, which refuses all calls but health and reflection for now."""
        api = self._config.api
        stalls = StallWatch(api.stall_s)
        watching = asyncio.create_task(stalls.run(), name="stalls")
        self._stack.callback(watching.cancel)
        server = grpc.aio.server(
            interceptors=[
                CallInterceptor(self._lifecycle, self._metrics, self._authenticator, self._tracing, stalls)
            ],
            options=_channel_options(api),
            maximum_concurrent_rpcs=self._max_calls,
        )
        register: list[tuple[Callable[[Any, Any], Any], object]] = [
            (
                generation_pb2_grpc.add_GenerationServiceServicer_to_server,
                GenerationService(self._generator, self._metrics),
            ),
            (
                adapters_pb2_grpc.add_AdapterServiceServicer_to_server,
                AdapterService(self._lifecycle, UploadDesk(self._config.engine.adapters)),
            ),
            (
                model_pb2_grpc.add_ModelServiceServicer_to_server,
                ModelService(self._lifecycle, self._version),
            ),
            (health_pb2_grpc.add_HealthServicer_to_server, self._health),
        ]
        for add, service in register:
            add(service, server)
        if api.reflection:
            reflection.enable_server_reflection(
                (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
            )
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = _address(api.host, api.port)
        credentials = None if api.tls is None else tls.server_credentials(api.tls)
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise FailedPreconditionError(f"{address} cannot be listened on; choose another --host or --port")
        if not is_loopback(api.host):
            if credentials is None:
                _log.warning("%s is no loopback address, and calls are not encrypted", api.host)
            if api.token_file is None and not self._certificates:
                _log.warning("%s is no loopback address, and anyone who reaches it may call", api.host)
        await server.start()
        self._stack.push_async_callback(server.stop, _STOP_GRACE_S)
        return port

    async def _listen_http(self) -> int | None:
        """Starts the HTTP server, whose API answers 503 for now. None: it is not wanted."""
        api = self._config.api
        if api.http_port < 0:
            return None
        try:
            from loraplex_server.api.http.application import application
            from loraplex_server.api.http.generation import HttpSettings
            from loraplex_server.api.http.listener import HttpListener
        except ImportError as error:
            raise FailedPreconditionError(
                f"--http-port needs {error.name}, which is not installed; pip install 'loraplex[server]'"
            ) from error
        app = application(
            self._lifecycle,
            self._metrics,
            self._authenticator,
            self._generator,
            HttpSettings(self._model_name, api.max_message_bytes, api.stall_s),
            self._version,
            self._tracing,
        )
        context = None if api.tls is None else tls.http_context(api.tls)
        family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
        try:
            listening = socket.create_server((api.host, api.http_port), family=family, backlog=1024)
        except OSError as error:
            raise FailedPreconditionError(
                f"{_address(api.host, api.http_port)} cannot be listened on ({error.strerror}); choose "
                "another --host or --http-port"
            ) from error
        self._stack.callback(listening.close)
        _find_dead_peers(listening)
        listener = HttpListener(
            app, listening, context, max_connections=self._max_calls, stop_grace_s=_STOP_GRACE_S
        )
        self._stack.push_async_callback(listener.close)
        return await listener.start()

    @property
    def _model_name(self) -> str:
        return self._config.api.model_name or _model_name(self._config.engine.model.model)

    @property
    def _max_calls(self) -> int:
        scheduler = self._config.engine.scheduler
        return scheduler.max_queue + scheduler.max_num_requests + _SPARE_CALLS

    def _expose_metrics(self) -> int | None:
        api = self._config.api
        if api.metrics_port < 0:
            return None
        try:
            server = MetricsPort(api.metrics_host, api.metrics_port, self._metrics.registry)
        except OSError as error:
            address = _address(api.metrics_host, api.metrics_port)
            raise FailedPreconditionError(
                f"metrics cannot listen on {address} ({error.strerror}); choose another --metrics-host or "
                "--metrics-port"
            ) from error
        self._stack.callback(server.close)
        return server.port

    async def _start_engine(self, launch: LaunchEngine) -> EngineClient:
        """Launches the engine and, while it loads, the tokenizer; then lets calls in."""
        config = self._config.engine
        handle = launch(config)
        self._engine_stack.push_async_callback(_end_engine, handle)
        ready = asyncio.create_task(asyncio.to_thread(handle.wait_ready))
        loading = asyncio.create_task(asyncio.to_thread(self._load_tokenizer))
        try:
            await asyncio.gather(ready, loading)
        except BaseException:
            # The threads end with what they wait for; only then is there nothing left to report.
            await asyncio.to_thread(handle.terminate)
            await asyncio.gather(ready, loading, return_exceptions=True)
            raise
        tokenizer = loading.result()
        engine = await EngineClient.connect(
            handle.socket_path,
            handle.token,
            self._journal.note,
            max_joined=self._config.api.max_tokens_per_message,
            max_unread=self._config.api.max_unread_tokens,
        )
        self._engine_stack.push_async_callback(engine.shutdown)
        await self._journal.replay(engine)
        self._metrics.set_info(engine.info, self._version)
        engine.on_stats(self._metrics.observe_stats)
        limits = Limits(
            vocab_size=engine.info.vocab_size,
            max_model_len=engine.info.max_model_len,
            max_prompt_chars=engine.info.max_model_len * tokenizer.max_chars_per_token,
            max_adapters=config.adapters.max_per_request,
            defaults=engine.info.sampling_defaults,
            speculative_tokens=config.scheduler.speculative_tokens,
        )
        chat = ChatPrompts(engine, tokenizer, limits.max_prompt_chars)
        self._engine_stack.push_async_callback(chat.close)
        tokenizers = AdapterTokenizers(tokenizer, limits.vocab_size, lambda: engine.tokenizers)
        self._engine_stack.push_async_callback(tokenizers.close)
        self._lifecycle.serve(Backend(engine, tokenizer, limits, chat, tokenizers))
        return engine

    def _load_tokenizer(self) -> Tokenizer:
        """Once: another engine serves the same model."""
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._config.engine.model.model)
        return self._tokenizer

    async def _drain(self, again: asyncio.Task[int], lost: asyncio.Task[None]) -> int:
        drain_s = self._config.api.drain_s
        _log.info("draining %d calls, for at most %g s", self._lifecycle.calls, drain_s)
        self._lifecycle.drain()
        await self._health.enter_graceful_shutdown()
        idle = asyncio.create_task(self._lifecycle.wait_idle())
        await asyncio.wait({idle, again, lost}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            idle.cancel()
            _log.warning("%d calls are cancelled", self._lifecycle.calls)
        return EXIT_FAILED if lost.done() else EXIT_OK

    async def _engine_lost(self) -> int:
        _log.error("the engine has died too often; the server ends")
        self._lifecycle.drain()
        await self._health.enter_graceful_shutdown()
        return EXIT_FAILED

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *_SERVICES):
            await self._health.set(service, status)


async def _end_engine(handle: EngineHandle) -> None:
    """Waits for an engine that was told to end, and ends it if it does not."""
    if not await asyncio.to_thread(handle.join, _ENGINE_EXIT_S):
        await asyncio.to_thread(handle.terminate)


def _tracing(endpoint: str, model: str, version: str) -> Tracing:
    if not endpoint:
        return NoTracing()
    try:
        from loraplex_server.api.telemetry.tracing.otlp import OtlpTracing
    except ImportError as error:
        raise FailedPreconditionError(
            f"--otlp-endpoint needs {error.name}, which is not installed; pip install 'loraplex[tracing]'"
        ) from error
    return OtlpTracing(endpoint, model, version)


def _find_dead_peers(listening: socket.socket) -> None:
    """Connections ask after clients that say nothing, so that one which vanished is noticed."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _model_name(model: str) -> str:
    """A hub id as it is; of a folder its name, since the rest says where it lies."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


def _load_tokenizer(model: str) -> Tokenizer:
    try:
        return Tokenizer.load(model)
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(f"the tokenizer of {model!r} cannot be loaded: {error}") from error


def _channel_options(api: ApiConfig) -> list[tuple[str, Any]]:
    age = [("grpc.max_connection_age_ms", round(api.max_connection_age_s * 1000))]
    return [
        *(age if api.max_connection_age_s else []),
        ("grpc.max_receive_message_length", api.max_message_bytes),
        ("grpc.max_send_message_length", api.max_message_bytes),
        # Without this a second server binds the same port and takes half of the calls.
        ("grpc.so_reuseport", 0),
        # A unary generation sends nothing for long: let clients ping, and find those that are gone.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", round(api.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(api.keepalive_timeout_s * 1000)),
        # Without this gRPC 1.85 waits a minute for the answer, whatever the line above says.
        ("grpc.http2.ping_timeout_ms", round(api.keepalive_timeout_s * 1000)),
    ]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _version() -> str:
    try:
        return importlib.metadata.version("loraplex")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
