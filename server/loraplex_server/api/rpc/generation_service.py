"""`loraplex.v1.GenerationService`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server.api.answers import timings
from loraplex_server.api.answers.generator import Generator
from loraplex_server.api.answers.merging import as_finished, merged
from loraplex_server.api.requests import convert
from loraplex_server.api.rpc.status import code_of_cancellation, to_message
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo, InternalError, ServerError

_log = logging.getLogger(__name__)

# Of a call, in the ids of the requests of its batch.
_MAX_ID_CHARS = 120


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Hands requests to the generator and its pieces to gRPC."""

    def __init__(self, generator: Generator, metrics: Metrics) -> None:
        self._generator = generator
        self._metrics = metrics

    def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        return self._messages(request, context)

    async def GenerateUnary(  # noqa: N802
        self, request: generation_pb2.GenerateUnaryRequest, context: Any
    ) -> generation_pb2.GenerateUnaryResponse:
        return await self._whole(request.request, context)

    async def GenerateBatch(  # noqa: N802
        self, request: generation_pb2.GenerateBatchRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateBatchResponse]:
        convert.check_batch(request)
        # More at a time would wait in the engine's queue, in the way of others.
        limit = self._generator.backend.engine.info.max_num_requests
        jobs = (self._of_batch(position, each, context) for position, each in enumerate(request.requests))
        async with contextlib.aclosing(as_finished(jobs, limit)) as answers:
            async for answer in answers:
                yield answer

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

    async def _messages(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        """The messages of all answers to one request."""
        accepted = await self._generator.accept(request, remaining_s=context.time_remaining())
        token_text = accepted[0].tokenizer.token_text
        request_id = log.request_id.get()
        why_left: Callable[[], str] = lambda: code_of_cancellation(context).lower()  # noqa: E731
        outputs = merged([self._generator.run(each, why_left) for each in accepted])
        async with contextlib.aclosing(outputs):
            async for index, (piece, end) in outputs:
                finish = None
                if end is not None:
                    timings.note(end)
                    finish = convert.to_finish(end)
                yield convert.to_generate_response(piece, finish, token_text, request_id, index)
                request_id = ""

    async def _whole(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> generation_pb2.GenerateUnaryResponse:
        """All of one request's messages in one."""
        whole = convert.WholeResponse()
        async with contextlib.aclosing(self._messages(request, context)) as messages:
            async for message in messages:
                whole.add(message)
        return whole.response()

    async def _of_batch(
        self, position: int, request: generation_pb2.GenerateRequest, context: Any
    ) -> generation_pb2.GenerateBatchResponse:
        """The answer to one request of a batch, or why there is none."""
        log.request_id.set(f"{log.request_id.get()[:_MAX_ID_CHARS]}-{position}")
        try:
            answer = await self._whole(request, context)
            return generation_pb2.GenerateBatchResponse(position=position, answer=answer)
        except ServerError as error:
            _log.info("request %d of a batch: %s: %s", position, error.code, error)
            info = error.info
        except Exception:
            _log.exception("request %d of a batch failed", position)
            info = ErrorInfo(InternalError.code, "")
        self._metrics.observe_error(info)
        status = to_message(info, log.request_id.get())
        failure = generation_pb2.RequestError(
            code=status.code, message=status.message, details=status.details
        )
        return generation_pb2.GenerateBatchResponse(position=position, error=failure)
