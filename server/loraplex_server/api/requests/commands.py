"""From messages of `AdapterService` to the engine's commands, checked first.

Each function raises InvalidArgumentError with one violation for each bad field.
"""

from __future__ import annotations

from loraplex.v1 import adapters_pb2
from loraplex_server.api.requests import check_adapters
from loraplex_server.api.requests.to_core import to_composition
from loraplex_server.wire.commands import (
    ComposeAdapter,
    GetAdapter,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapters,
    UnloadAdapter,
)


def load(message: adapters_pb2.LoadAdapterRequest) -> LoadAdapter:
    check_adapters.check_load(message)
    return LoadAdapter(message.name, message.source, message.load_inplace)


def compose(message: adapters_pb2.RegisterCompositionRequest) -> ComposeAdapter:
    check_adapters.check_composition(message)
    return ComposeAdapter(message.name, to_composition(message), message.load_inplace)


def unload(message: adapters_pb2.UnloadAdapterRequest) -> UnloadAdapter:
    check_adapters.check_unload(message)
    return UnloadAdapter(message.name, message.grace_seconds if message.HasField("grace_seconds") else None)


def get(message: adapters_pb2.GetAdapterRequest) -> GetAdapter:
    check_adapters.check_adapter_name(message.name)
    return GetAdapter(message.name)


def pin(message: adapters_pb2.PinAdapterRequest) -> PinAdapter:
    check_adapters.check_adapter_name(message.name)
    return PinAdapter(message.name, message.pinned if message.HasField("pinned") else True)


def prefetch(message: adapters_pb2.PrefetchRequest) -> PrefetchAdapters:
    check_adapters.check_prefetch(message)
    return PrefetchAdapters(tuple(message.names), to_device=not message.host_only)
