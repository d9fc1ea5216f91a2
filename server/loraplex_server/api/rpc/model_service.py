"""`loraplex.v1.ModelService`."""

from __future__ import annotations

from typing import Any

from loraplex.v1 import model_pb2, model_pb2_grpc
from loraplex_server.api.answers.to_proto import to_model
from loraplex_server.api.lifecycle import Lifecycle


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Answers with the engine's description from when it was connected to; it never changes."""

    def __init__(self, lifecycle: Lifecycle, server_version: str) -> None:
        self._lifecycle = lifecycle
        self._server_version = server_version

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Any
    ) -> model_pb2.GetModelResponse:
        info = self._lifecycle.backend.engine.info
        return model_pb2.GetModelResponse(model=to_model(info, self._server_version))
