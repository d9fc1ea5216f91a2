"""`loraplex.v1.AdapterService`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests import convert
from loraplex_server.api.requests.uploads import UploadDesk
from loraplex_server.core.errors import AlreadyExistsError, Reason, ServerError
from loraplex_server.wire.commands import (
    AdoptAdapter,
    ComposeAdapter,
    GetAdapter,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapters,
    UnloadAdapter,
)


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Checks names and hands each operation to the engine, which owns the adapters."""

    def __init__(self, lifecycle: Lifecycle, uploads: UploadDesk) -> None:
        self._lifecycle = lifecycle
        self._uploads = uploads

    async def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        convert.check_load_adapter(request)
        command = LoadAdapter(request.name, request.source, request.load_inplace)
        status = await self._lifecycle.backend.engine.command(command)
        return adapters_pb2.LoadAdapterResponse(adapter=convert.to_adapter(status))

    async def RegisterComposition(  # noqa: N802
        self, request: adapters_pb2.RegisterCompositionRequest, context: Any
    ) -> adapters_pb2.RegisterCompositionResponse:
        command = ComposeAdapter(request.name, convert.to_composition(request), request.load_inplace)
        status = await self._lifecycle.backend.engine.command(command)
        return adapters_pb2.RegisterCompositionResponse(adapter=convert.to_adapter(status))

    async def UploadAdapter(  # noqa: N802
        self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        self._uploads.check_allowed()
        engine = self._lifecycle.backend.engine
        requests = aiter(requests)
        header = await self._uploads.header(requests)
        if not header.load_inplace:
            await self._check_free(header.name)
        async with self._uploads.receive(header, requests) as upload:
            status = await engine.command(
                AdoptAdapter(header.name, str(upload.folder), upload.sha256, header.load_inplace)
            )
        return adapters_pb2.UploadAdapterResponse(adapter=convert.to_adapter(status))

    async def _check_free(self, name: str) -> None:
        """Raises AlreadyExistsError for a name that is taken, before all the bytes of an upload have come."""
        try:
            known = await self._lifecycle.backend.engine.command(GetAdapter(name))
        except ServerError:
            # There is none, or one that cannot be served and may be replaced.
            return
        if not known.draining:
            raise AlreadyExistsError(
                f"adapter {name!r} is registered already; replace it with load_inplace",
                resource=("adapter", name),
                reason=Reason.ADAPTER_EXISTS,
            )

    async def UnloadAdapter(  # noqa: N802
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        command = UnloadAdapter(request.name, convert.unload_grace_s(request))
        remaining = await self._lifecycle.backend.engine.command(command)
        return adapters_pb2.UnloadAdapterResponse(remaining=map(convert.to_adapter, remaining))

    async def ListAdapters(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = await self._lifecycle.backend.engine.command(ListAdapters())
        return adapters_pb2.ListAdaptersResponse(adapters=map(convert.to_adapter, adapters))

    async def GetAdapter(  # noqa: N802
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        convert.check_adapter_name(request.name)
        status = await self._lifecycle.backend.engine.command(GetAdapter(request.name))
        return adapters_pb2.GetAdapterResponse(adapter=convert.to_adapter(status))

    async def PinAdapter(  # noqa: N802
        self, request: adapters_pb2.PinAdapterRequest, context: Any
    ) -> adapters_pb2.PinAdapterResponse:
        convert.check_adapter_name(request.name)
        command = PinAdapter(request.name, request.pinned if request.HasField("pinned") else True)
        status = await self._lifecycle.backend.engine.command(command)
        return adapters_pb2.PinAdapterResponse(adapter=convert.to_adapter(status))

    async def Prefetch(  # noqa: N802
        self, request: adapters_pb2.PrefetchRequest, context: Any
    ) -> adapters_pb2.PrefetchResponse:
        convert.check_prefetch(request)
        command = PrefetchAdapters(tuple(request.names), to_device=not request.host_only)
        adapters = await self._lifecycle.backend.engine.command(command)
        return adapters_pb2.PrefetchResponse(adapters=map(convert.to_adapter, adapters))

    async def Watch(  # noqa: N802
        self, request: adapters_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[adapters_pb2.WatchResponse]:
        convert.check_watch(request)
        names = set(request.names)
        changes = self._lifecycle.backend.engine.watch_adapters()
        first = True
        async with contextlib.aclosing(self._lifecycle.until_draining(changes)) as watched:
            async for change in watched:
                response = adapters_pb2.WatchResponse(
                    adapters=[convert.to_adapter(s) for s in change.adapters if not names or s.name in names],
                    removed=[name for name in change.removed if not names or name in names],
                )
                if first or response.adapters or response.removed:
                    yield response
                first = False
