"""`loraplex.v1.GenerationService`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server import log
from loraplex_server.api import convert
from loraplex_server.api.generator import Generator
from loraplex_server.api.status import code_of_cancellation


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Hands requests to the generator and its pieces to gRPC."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        [accepted] = await self._generator.accept(request, remaining_s=context.time_remaining())
        token_text = self._generator.backend.tokenizer.token_text
        request_id = log.request_id.get()
        outputs = self._generator.run(accepted, lambda: code_of_cancellation(context).lower())
        async with contextlib.aclosing(outputs):
            async for piece, end in outputs:
                finish = None if end is None else convert.to_finish(end)
                yield convert.to_generate_response(piece, finish, token_text, request_id)
                request_id = ""

    async def GenerateUnary(  # noqa: N802
        self, request: generation_pb2.GenerateUnaryRequest, context: Any
    ) -> generation_pb2.GenerateUnaryResponse:
        response = generation_pb2.GenerateUnaryResponse()
        texts: list[str] = []
        async with contextlib.aclosing(self.Generate(request.request, context)) as messages:
            async for message in messages:
                texts.append(message.text)
                response.token_ids.extend(message.token_ids)
                response.logprobs.extend(message.logprobs)
                if message.request_id:
                    response.request_id = message.request_id
                if message.HasField("finish"):
                    response.finish.CopyFrom(message.finish)
        response.text = "".join(texts)
        return response

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, context: Any
    ) -> generation_pb2.TokenizeResponse:
        return generation_pb2.TokenizeResponse(token_ids=await self._generator.tokenize(request))

    async def CountTokens(  # noqa: N802
        self, request: generation_pb2.CountTokensRequest, context: Any
    ) -> generation_pb2.CountTokensResponse:
        count = len(await self._generator.tokenize(request))
        limit = self._generator.backend.limits.max_model_len
        return generation_pb2.CountTokensResponse(count=count, max_model_len=limit)
