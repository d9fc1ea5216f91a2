"""The gRPC port: all services behind one interceptor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from loraplex_server.api.address import address
from loraplex_server.api.requests.uploads import UploadDesk
from loraplex_server.api.rpc.adapter_service import AdapterService
from loraplex_server.api.rpc.generation_service import GenerationService
from loraplex_server.api.rpc.health import SERVICE_NAMES, Health
from loraplex_server.api.rpc.interceptors import CallInterceptor
from loraplex_server.api.rpc.model_service import ModelService
from loraplex_server.api.rpc.stalls import StallWatch
from loraplex_server.api.security import tls
from loraplex_server.api.services import Services
from loraplex_server.config import ApiConfig, ServerConfig
from loraplex_server.core.errors import FailedPreconditionError


async def listen_grpc(
    config: ServerConfig,
    services: Services,
    health_service: Health,
    stack: contextlib.AsyncExitStack,
    *,
    max_calls: int,
    stop_grace_s: float,
) -> int:
    """Starts the gRPC server, which refuses all calls but health and reflection for now.

    Args:
        stack: ends it.
        max_calls: at once; more are refused by gRPC itself.
        stop_grace_s: for the last messages of calls that drained, or were cancelled, to leave.

    Returns:
        the port.

    Raises:
        FailedPreconditionError: the address cannot be listened on.
    """
    api = config.api
    stalls = StallWatch(api.stall_s)
    watching = asyncio.create_task(stalls.run(), name="stalls")
    stack.callback(watching.cancel)
    calls = CallInterceptor(
        services.lifecycle, services.metrics, services.authenticator, services.tracing, stalls
    )
    server = grpc.aio.server(
        interceptors=[calls], options=_channel_options(api), maximum_concurrent_rpcs=max_calls
    )
    _register(server, config, services, health_service)
    await health_service.set(serving=False)
    port = _bind(server, api)
    await server.start()
    stack.push_async_callback(server.stop, stop_grace_s)
    return port


def _register(server: Any, config: ServerConfig, services: Services, health_service: Health) -> None:
    lifecycle = services.lifecycle
    generation = GenerationService(lifecycle, services.intake, services.generator, services.metrics)
    adapters = AdapterService(lifecycle, UploadDesk(config.engine.adapters))
    every: list[tuple[Callable[[Any, Any], None], object]] = [
        (generation_pb2_grpc.add_GenerationServiceServicer_to_server, generation),
        (adapters_pb2_grpc.add_AdapterServiceServicer_to_server, adapters),
        (model_pb2_grpc.add_ModelServiceServicer_to_server, ModelService(lifecycle, services.version)),
        (health_pb2_grpc.add_HealthServicer_to_server, health_service.servicer),
    ]
    for add, service in every:
        add(service, server)
    if config.api.reflection:
        reflection.enable_server_reflection(
            (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )


def _bind(server: grpc.aio.Server, api: ApiConfig) -> int:
    where = address(api.host, api.port)
    try:
        if api.tls is None:
            port = server.add_insecure_port(where)
        else:
            port = server.add_secure_port(where, tls.server_credentials(api.tls))
    except RuntimeError:
        port = 0
    if not port:
        raise FailedPreconditionError(f"{where} cannot be listened on; choose another --host or --port")
    return port


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
