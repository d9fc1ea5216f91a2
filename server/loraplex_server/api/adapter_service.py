"""`loraplex.v1.AdapterService`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from loraplex_server.api import convert
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.uploads import UploadDesk
from loraplex_server.errors import AlreadyExistsError


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Checks names and hands each operation to the engine, which owns the adapters."""

    def __init__(self, lifecycle: Lifecycle, uploads: UploadDesk) -> None:
        self._lifecycle = lifecycle
        self._uploads = uploads

    async def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        convert.check_load_adapter(request)
        status = await self._lifecycle.backend.engine.load_adapter(
            request.name, request.source, inplace=request.load_inplace
        )
        return adapters_pb2.LoadAdapterResponse(adapter=convert.to_adapter(status))

    async def RegisterComposition(  # noqa: N802
        self, request: adapters_pb2.RegisterCompositionRequest, context: Any
    ) -> adapters_pb2.RegisterCompositionResponse:
        composition = convert.to_composition(request)
        status = await self._lifecycle.backend.engine.compose_adapter(
            request.name, composition, inplace=request.load_inplace
        )
        return adapters_pb2.RegisterCompositionResponse(adapter=convert.to_adapter(status))

    async def UploadAdapter(  # noqa: N802
        self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        self._uploads.check_allowed()
        engine = self._lifecycle.backend.engine
        requests = aiter(requests)
        header = await self._uploads.header(requests)
        if not header.load_inplace and header.name in {known.name for known in await engine.list_adapters()}:
            # Found before all the bytes have come.
            raise AlreadyExistsError(
                f"adapter {header.name!r} is registered already; replace it with load_inplace",
                resource=("adapter", header.name),
            )
        async with self._uploads.receive(header, requests) as upload:
            status = await engine.adopt_adapter(
                header.name, upload.folder, upload.sha256, inplace=header.load_inplace
            )
        return adapters_pb2.UploadAdapterResponse(adapter=convert.to_adapter(status))

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
