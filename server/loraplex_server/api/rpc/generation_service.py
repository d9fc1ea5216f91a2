"""`loraplex.v1.GenerationService`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server.api.answers.generator import Generator, WhyLeft
from loraplex_server.api.answers.merging import as_finished
from loraplex_server.api.answers.to_proto import to_generate_response, to_unary_response
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests.check import check_batch
from loraplex_server.api.requests.intake import Intake
from loraplex_server.api.rpc.status import code_of_cancellation, to_message
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo, InternalError, ServerError

_log = logging.getLogger(__name__)

# Of a call, in the ids of the requests of its batch.
_MAX_ID_CHARS = 120


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Writes answers to gRPC's clients."""

    def __init__(self, lifecycle: Lifecycle, intake: Intake, generator: Generator, metrics: Metrics) -> None:
        self._lifecycle = lifecycle
        self._intake = intake
        self._generator = generator
        self._metrics = metrics

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        accepted = await self._intake.accept(request, remaining_s=context.time_remaining())
        token_text = accepted.tokenizer.token_text
        request_id = log.request_id.get()
        outputs = self._generator.run([accepted], _why_left(context))
        async with contextlib.aclosing(outputs):
            async for index, piece, end in outputs:
                yield to_generate_response(piece, end, token_text, request_id, index)
                request_id = ""

    async def GenerateUnary(  # noqa: N802
        self, request: generation_pb2.GenerateUnaryRequest, context: Any
    ) -> generation_pb2.GenerateUnaryResponse:
        return await self._whole(request.request, context)

    async def GenerateBatch(  # noqa: N802
        self, request: generation_pb2.GenerateBatchRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateBatchResponse]:
        check_batch(request)
        # More at a time would wait in the engine's queue, in the way of others.
        limit = self._lifecycle.backend.engine.info.max_num_requests
        jobs = (self._of_batch(position, each, context) for position, each in enumerate(request.requests))
        async with contextlib.aclosing(as_finished(jobs, limit)) as answers:
            async for answer in answers:
                yield answer

    async def Tokenize(  # noqa: N802
        self, request: generation_pb2.TokenizeRequest, context: Any
    ) -> generation_pb2.TokenizeResponse:
        return generation_pb2.TokenizeResponse(token_ids=await self._intake.tokenize(request))

    async def CountTokens(  # noqa: N802
        self, request: generation_pb2.CountTokensRequest, context: Any
    ) -> generation_pb2.CountTokensResponse:
        count = len(await self._intake.tokenize(request))
        limit = self._lifecycle.backend.limits.rules.max_model_len
        return generation_pb2.CountTokensResponse(count=count, max_model_len=limit)

    async def _whole(
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> generation_pb2.GenerateUnaryResponse:
        accepted = await self._intake.accept(request, remaining_s=context.time_remaining())
        answers = await self._generator.whole([accepted], _why_left(context))
        return to_unary_response(answers, accepted.tokenizer.token_text, log.request_id.get())

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


def _why_left(context: Any) -> WhyLeft:
    return lambda: code_of_cancellation(context).lower()
