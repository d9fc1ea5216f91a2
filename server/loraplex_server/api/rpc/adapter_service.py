"""`loraplex.v1.AdapterService`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from loraplex_server.api.answers.to_proto import to_adapter
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests import check_adapters
from loraplex_server.api.requests.to_core import to_composition
from loraplex_server.api.requests.uploads import UploadDesk
from loraplex_server.core.errors import AlreadyExistsError, Reason, ServerError


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Checks names and hands each operation to the engine, which owns the adapters."""

    def __init__(self, lifecycle: Lifecycle, uploads: UploadDesk) -> None:
        self._lifecycle = lifecycle
        self._uploads = uploads

    async def LoadAdapter(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        check_adapters.check_load(request)
        status = await self._lifecycle.backend.engine.load_adapter(
            request.name, request.source, inplace=request.load_inplace
        )
        return adapters_pb2.LoadAdapterResponse(adapter=to_adapter(status))

    async def RegisterComposition(  # noqa: N802
        self, request: adapters_pb2.RegisterCompositionRequest, context: Any
    ) -> adapters_pb2.RegisterCompositionResponse:
        check_adapters.check_composition(request)
        composition = to_composition(request)
        status = await self._lifecycle.backend.engine.compose_adapter(
            request.name, composition, inplace=request.load_inplace
        )
        return adapters_pb2.RegisterCompositionResponse(adapter=to_adapter(status))

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
            status = await engine.adopt_adapter(
                header.name, upload.folder, upload.sha256, inplace=header.load_inplace
            )
        return adapters_pb2.UploadAdapterResponse(adapter=to_adapter(status))

    async def _check_free(self, name: str) -> None:
        """Raises AlreadyExistsError for a name that is taken, before all the bytes of an upload have come."""
        try:
            known = await self._lifecycle.backend.engine.get_adapter(name)
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
        check_adapters.check_unload(request)
        grace_s = request.grace_seconds if request.HasField("grace_seconds") else None
        remaining = await self._lifecycle.backend.engine.unload_adapter(request.name, grace_s)
        return adapters_pb2.UnloadAdapterResponse(remaining=map(to_adapter, remaining))

    async def ListAdapters(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = await self._lifecycle.backend.engine.list_adapters()
        return adapters_pb2.ListAdaptersResponse(adapters=map(to_adapter, adapters))

    async def GetAdapter(  # noqa: N802
        self, request: adapters_pb2.GetAdapterRequest, context: Any
    ) -> adapters_pb2.GetAdapterResponse:
        check_adapters.check_adapter_name(request.name)
        status = await self._lifecycle.backend.engine.get_adapter(request.name)
        return adapters_pb2.GetAdapterResponse(adapter=to_adapter(status))

    async def PinAdapter(  # noqa: N802
        self, request: adapters_pb2.PinAdapterRequest, context: Any
    ) -> adapters_pb2.PinAdapterResponse:
        check_adapters.check_adapter_name(request.name)
        pinned = request.pinned if request.HasField("pinned") else True
        status = await self._lifecycle.backend.engine.pin_adapter(request.name, pinned)
        return adapters_pb2.PinAdapterResponse(adapter=to_adapter(status))

    async def Prefetch(  # noqa: N802
        self, request: adapters_pb2.PrefetchRequest, context: Any
    ) -> adapters_pb2.PrefetchResponse:
        check_adapters.check_prefetch(request)
        adapters = await self._lifecycle.backend.engine.prefetch_adapters(
            list(request.names), to_device=not request.host_only
        )
        return adapters_pb2.PrefetchResponse(adapters=map(to_adapter, adapters))

    async def Watch(  # noqa: N802
        self, request: adapters_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[adapters_pb2.WatchResponse]:
        check_adapters.check_watch(request)
        names = set(request.names)
        changes = self._lifecycle.backend.engine.watch_adapters()
        first = True
        async with contextlib.aclosing(self._lifecycle.until_draining(changes)) as watched:
            async for change in watched:
                response = adapters_pb2.WatchResponse(
                    adapters=[to_adapter(s) for s in change.adapters if not names or s.name in names],
                    removed=[name for name in change.removed if not names or name in names],
                )
                if first or response.adapters or response.removed:
                    yield response
                first = False
