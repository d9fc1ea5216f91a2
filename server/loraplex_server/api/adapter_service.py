"""`loraplex.v1.AdapterService`."""

from __future__ import annotations

from typing import Any

from loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from loraplex_server.api import convert
from loraplex_server.api.lifecycle import Lifecycle


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Checks names and hands each operation to the engine, which owns the adapters."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    async def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        convert.check_load_adapter(request)
        status = await self._lifecycle.backend.engine.load_adapter(
            request.name, request.source, inplace=request.load_inplace
        )
        return adapters_pb2.LoadAdapterResponse(adapter=convert.to_adapter(status))

    async def UnloadAdapter(  # noqa: N802
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        grace_s = convert.unload_grace_s(request)
        remaining = await self._lifecycle.backend.engine.unload_adapter(request.name, grace_s)
        return adapters_pb2.UnloadAdapterResponse(remaining=map(convert.to_adapter, remaining))

    async def ListAdapters(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = await self._lifecycle.backend.engine.list_adapters()
        return adapters_pb2.ListAdaptersResponse(adapters=map(convert.to_adapter, adapters))

    async def GetAdapter(  # noqa: N802
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        convert.check_adapter_name(request.name)
        status = await self._lifecycle.backend.engine.get_adapter(request.name)
        return adapters_pb2.GetAdapterResponse(adapter=convert.to_adapter(status))

    async def PinAdapter(  # noqa: N802
        self, request: adapters_pb2.PinAdapterRequest, context: Any
    ) -> adapters_pb2.PinAdapterResponse:
        convert.check_adapter_name(request.name)
        pinned = request.pinned if request.HasField("pinned") else True
        status = await self._lifecycle.backend.engine.pin_adapter(request.name, pinned)
        return adapters_pb2.PinAdapterResponse(adapter=convert.to_adapter(status))

    async def Prefetch(  # noqa: N802
        self, request: adapters_pb2.PrefetchRequest, context: Any
    ) -> adapters_pb2.PrefetchResponse:
        convert.check_prefetch(request)
        adapters = await self._lifecycle.backend.engine.prefetch_adapters(
            list(request.names), to_device=not request.host_only
        )
        return adapters_pb2.PrefetchResponse(adapters=map(convert.to_adapter, adapters))
