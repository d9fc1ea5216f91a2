"""The adapters that a server knows."""

from __future__ import annotations

import os
from collections.abc import Sequence

from loraplex import _requests as requests
from loraplex._async.streams import AsyncAdapterWatch, AsyncMessages
from loraplex._async.transport import AsyncTransport
from loraplex._async.waiting import outgoing
from loraplex._config import Timeout
from loraplex._options import AdapterMix
from loraplex._readers import ChangesReader, adapter_info
from loraplex._types import AdapterInfo
from loraplex._upload import Progress, upload_parts
from loraplex.v1 import adapters_pb2


class AsyncAdapters:
    """The adapters that the server knows: `client.adapters`.

    >>> async def look():
    ...     async with AsyncClient("127.0.0.1:50051") as client:
    ...         print([adapter.name for adapter in await client.adapters.list()][:3])
    ...         pinned = await client.adapters.pin("upper")
    ...         unpinned = await client.adapters.pin("upper", False)
    ...         print(pinned.pinned, unpinned.pinned)
    >>> asyncio.run(look())
    ['atbash', 'caesar1', 'caesar25']
    True False
    """

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._call = transport.call

    async def load(
        self,
        name: str,
        source: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Registers the adapter that PEFT saved in the folder `source`, a path on the server's machine.

        With `load_inplace` it replaces an adapter of that name, whose running requests finish on the old one.
        """
        request = requests.load_request(name, source, load_inplace)
        response = await self._call("AdapterService/LoadAdapter", request, timeout)
        return adapter_info(response.adapter)

    async def register_composition(
        self,
        name: str,
        combination_type: str,
        members: AdapterMix,
        *,
        density: float | None = None,
        majority_sign: str | None = None,
        svd_rank: int | None = None,
        seed: int | None = None,
        load_inplace: bool = False,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Registers a composition: an adapter made from several by PEFT's `add_weighted_adapter`.

        Args:
            combination_type: "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties",
                "dare_linear_svd", "dare_ties_svd", "magnitude_prune" or "magnitude_prune_svd".
            members: `[("sql", 1.0), ("polite", 0.5)]`, or a mapping of names to weights.
            density: share of the values to keep, for ties, dare and magnitude_prune.
            majority_sign: "total" or "frequency", for ties.
            svd_rank: rank of the result, for svd; None is the largest of the members'.
            seed: seed of the values that dare drops.
        """
        request = requests.composition_request(
            name,
            combination_type,
            members,
            density=density,
            majority_sign=majority_sign,
            svd_rank=svd_rank,
            seed=seed,
            load_inplace=load_inplace,
        )
        response = await self._call("AdapterService/RegisterComposition", request, timeout)
        return adapter_info(response.adapter)

    async def upload(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        load_inplace: bool = False,
        progress: Progress | None = None,
        timeout: Timeout | None = None,
    ) -> AdapterInfo:
        """Sends the adapter that PEFT saved in `folder`, on this machine, and registers it.

        A tokenizer and a chat template that were saved beside it are sent too.

        Args:
            progress: called with the bytes sent so far, and all there are; perhaps on another thread.
        """
        parts = upload_parts(name, folder, load_inplace, progress)
        response = await self._call("AdapterService/UploadAdapter", outgoing(parts), timeout)
        return adapter_info(response.adapter)

    async def unload(
        self, name: str, *, grace_seconds: float | None = None, timeout: Timeout | None = None
    ) -> list[AdapterInfo]:
        """Waits for the adapter's running requests, frees it, and returns the adapters that remain.

        Requests that still run after `grace_seconds` are cancelled; None lets them run to their end.
        """
        request = requests.unload_request(name, grace_seconds)
        response = await self._call("AdapterService/UnloadAdapter", request, timeout)
        return [adapter_info(adapter) for adapter in response.remaining]

    async def prefetch(
        self, names: Sequence[str], *, host_only: bool = False, timeout: Timeout | None = None
    ) -> list[AdapterInfo]:
        """Hints that adapters will be needed: the server loads them as far as there is free room.

        Returns at once, with their present states.
        """
        response = await self._call(
            "AdapterService/Prefetch", requests.prefetch_request(names, host_only), timeout
        )
        return [adapter_info(adapter) for adapter in response.adapters]

    def watch(self, names: Sequence[str] = (), *, timeout: Timeout | None = None) -> AsyncAdapterWatch:
        """An iterator of changes: first all adapters, or those of `names`, then each that changes."""
        request = requests.watch_request(names)
        call = self._transport.begin("AdapterService/Watch", timeout)
        return AsyncAdapterWatch(AsyncMessages(self._transport, call, request), ChangesReader())

    async def list(self, *, timeout: Timeout | None = None) -> list[AdapterInfo]:
        """All registered adapters."""
        response = await self._call(
            "AdapterService/ListAdapters", adapters_pb2.ListAdaptersRequest(), timeout
        )
        return [adapter_info(adapter) for adapter in response.adapters]

    async def get(self, name: str, *, timeout: Timeout | None = None) -> AdapterInfo:
        """One adapter."""
        request = requests.named(adapters_pb2.GetAdapterRequest, name)
        response = await self._call("AdapterService/GetAdapter", request, timeout)
        return adapter_info(response.adapter)

    async def pin(self, name: str, pinned: bool = True, *, timeout: Timeout | None = None) -> AdapterInfo:
        """Loads the adapter to the device and keeps it there; `pinned=False` allows eviction again."""
        response = await self._call("AdapterService/PinAdapter", requests.pin_request(name, pinned), timeout)
        return adapter_info(response.adapter)
