"""`loraplex.v1.AdapterService`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from loraplex_server.api.answers.to_proto import to_adapter
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests import commands
from loraplex_server.api.requests.check_adapters import check_watch
from loraplex_server.api.requests.uploads import UploadDesk
from loraplex_server.core.errors import AlreadyExistsError, Reason, ServerError
from loraplex_server.wire.client import EngineClient
from loraplex_server.wire.commands import AdoptAdapter, GetAdapter, ListAdapters


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Turns each message into a command to the engine, which owns the adapters."""

    def __init__(self, lifecycle: Lifecycle, uploads: UploadDesk) -> None:
        self._lifecycle = lifecycle
        self._uploads = uploads

    @property
    def _engine(self) -> EngineClient:
        return self._lifecycle.backend.engine

    async def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        status = await self._engine.command(commands.load(request))
        return adapters_pb2.LoadAdapterResponse(adapter=to_adapter(status))

    async def RegisterComposition(  # noqa: N802
        self, request: adapters_pb2.RegisterCompositionRequest, context: Any
    ) -> adapters_pb2.RegisterCompositionResponse:
        status = await self._engine.command(commands.compose(request))
        return adapters_pb2.RegisterCompositionResponse(adapter=to_adapter(status))

    async def UploadAdapter(  # noqa: N802
        self, requests: AsyncIterator[adapters_pb2.UploadAdapterRequest], context: Any
    ) -> adapters_pb2.UploadAdapterResponse:
        self._uploads.check_allowed()
        engine = self._engine
        requests = aiter(requests)
        header = await self._uploads.header(requests)
        if not header.load_inplace:
            await self._check_free(header.name)
        async with self._uploads.receive(header, requests) as upload:
            status = await engine.command(
                AdoptAdapter(header.name, str(upload.folder), upload.sha256, header.load_inplace)
            )
        return adapters_pb2.UploadAdapterResponse(adapter=to_adapter(status))

    async def UnloadAdapter(  # noqa: N802
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        remaining = await self._engine.command(commands.unload(request))
        return adapters_pb2.UnloadAdapterResponse(remaining=map(to_adapter, remaining))

    async def ListAdapters(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = await self._engine.command(ListAdapters())
        return adapters_pb2.ListAdaptersResponse(adapters=map(to_adapter, adapters))

    async def GetAdapter(  # noqa: N802
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        status = await self._engine.command(commands.get(request))
        return adapters_pb2.GetAdapterResponse(adapter=to_adapter(status))

    async def PinAdapter(  # noqa: N802
        self, request: adapters_pb2.PinAdapterRequest, context: Any
    ) -> adapters_pb2.PinAdapterResponse:
        status = await self._engine.command(commands.pin(request))
        return adapters_pb2.PinAdapterResponse(adapter=to_adapter(status))

    async def Prefetch(  # noqa: N802
        self, request: adapters_pb2.PrefetchRequest, context: Any
    ) -> adapters_pb2.PrefetchResponse:
        adapters = await self._engine.command(commands.prefetch(request))
        return adapters_pb2.PrefetchResponse(adapters=map(to_adapter, adapters))

    async def Watch(  # noqa: N802
        self, request: adapters_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[adapters_pb2.WatchResponse]:
        check_watch(request)
        names = set(request.names)
        first = True
        changes = self._lifecycle.until_draining(self._engine.watch_adapters())
        async with contextlib.aclosing(changes) as watched:
            async for change in watched:
                response = adapters_pb2.WatchResponse(
                    adapters=[to_adapter(s) for s in change.adapters if not names or s.name in names],
                    removed=[name for name in change.removed if not names or name in names],
                )
                if first or response.adapters or response.removed:
                    yield response
                first = False

    async def _check_free(self, name: str) -> None:
        """Raises AlreadyExistsError for a name that is taken, before all the bytes of an upload have come."""
        try:
            known = await self._engine.command(GetAdapter(name))
        except ServerError:
            # There is none, or one that cannot be served and may be replaced.
            return
        if not known.draining:
            raise AlreadyExistsError(
                f"adapter {name!r} is registered already; replace it with load_inplace",
                resource=("adapter", name),
                reason=Reason.ADAPTER_EXISTS,
            )
