"""`GET /v1/models`: the base model and its adapters; each can be a request's `model`."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.http.generation import MODEL_KEY, HttpSettings
from loraplex_server.api.http.schema import Model, ModelList
from loraplex_server.api.http.translate import adapter_of
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.wire.commands import GetAdapter, ListAdapters

_OWNER = "loraplex"


class Models:
    """The two endpoints that list the models."""

    def __init__(self, lifecycle: Lifecycle, settings: HttpSettings) -> None:
        self._lifecycle = lifecycle
        self._base = settings.model_name
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        adapters = await self._lifecycle.backend.engine.command(ListAdapters())
        # One that drains can no longer be named.
        served = [self._adapter(adapter) for adapter in adapters if not adapter.draining]
        return _json(ModelList([self._base_model(), *(each for each in served if each.id != self._base)]))

    async def get(self, request: Request) -> Response:
        name = request.scope[MODEL_KEY] = request.path_params["model"]
        if not (adapter := adapter_of(name, self._base)):
            return _json(self._base_model())
        return _json(self._adapter(await self._lifecycle.backend.engine.command(GetAdapter(adapter))))

    def _base_model(self) -> Model:
        info = self._lifecycle.backend.engine.info
        return Model(
            id=self._base,
            created=self._created,
            owned_by=_OWNER,
            max_model_len=info.max_model_len,
            content_hash=info.weight_checksum,
        )

    def _adapter(self, status: AdapterStatus) -> Model:
        return Model(
            id=status.name,
            created=self._created,
            owned_by=_OWNER,
            max_model_len=self._lifecycle.backend.engine.info.max_model_len,
            parent=self._base,
            state=status.state,
            content_hash=status.content_hash or None,
        )


def _json(value: Model | ModelList) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
