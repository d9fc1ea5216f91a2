"""`loraplex.v1.GenerationService`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from typing import Any

from loraplex.v1 import generation_pb2, generation_pb2_grpc
from loraplex_server import log
from loraplex_server.api import authentication, convert
from loraplex_server.api.answer import Answer, Piece
from loraplex_server.api.lifecycle import Backend, Lifecycle
from loraplex_server.api.status import code_of_cancellation
from loraplex_server.core.request import Request
from loraplex_server.engine.messages import Times
from loraplex_server.errors import DeadlineExceededError, InternalError, ServerError
from loraplex_server.metrics import Metrics


class _Progress:
    """When things happened to one request; seconds since its arrival."""

    def __init__(self) -> None:
        self._arrived = time.perf_counter()
        self.first_token_s: float | None = None

    def elapsed(self) -> float:
        return time.perf_counter() - self._arrived


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Submits requests to the engine and streams their text."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._serial = itertools.count(1)

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateResponse]:
        backend = self._lifecycle.backend
        progress = _Progress()
        core = await self._accept(backend, request, context)
        request_id = log.request_id.get()
        answer = Answer(backend.tokenizer, core.prompt_token_ids, request.stopping.stop)
        async with contextlib.aclosing(self._pieces(backend, core, answer, progress, context)) as pieces:
            async for piece in pieces:
                finish = _finish(piece, core, answer, progress)
                yield convert.to_generate_response(piece, finish, backend.tokenizer.token_text, request_id)
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

    async def _accept(
        self, backend: Backend, message: generation_pb2.GenerateRequest, context: Any
    ) -> Request:
        """Validates and tokenises."""
        if message.HasField("request_id") and convert.valid_request_id(message.request_id):
            log.request_id.set(message.request_id)
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceededError("the deadline had passed when the request arrived")
        deadline_s = None if remaining is None else time.time() + remaining
        convert.check_generate(message, backend.limits)
        if message.WhichOneof("prompt") == "text":
            prompt_token_ids = await backend.tokenizer.encode(message.text)
        else:
            prompt_token_ids = tuple(message.token_ids.ids)
        # A caller may send one id many times; the engine needs each to be another.
        engine_id = f"{log.request_id.get()}#{next(self._serial)}"
        return convert.to_request(
            message,
            prompt_token_ids,
            backend.limits,
            request_id=engine_id,
            tenant=authentication.tenant.get(),
            deadline_s=deadline_s,
        )

    async def _pieces(
        self, backend: Backend, request: Request, answer: Answer, progress: _Progress, context: Any
    ) -> AsyncGenerator[Piece]:
        """The answer's pieces. Leaving early, for whatever reason, ends the request in the engine."""
        outcome: str | None = None
        times: Times | None = None
        deltas = backend.engine.stream(request)
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    if delta.token_ids and progress.first_token_s is None:
                        progress.first_token_s = progress.elapsed()
                        self._metrics.observe_first_token(progress.first_token_s)
                    piece = answer.push(delta)
                    if piece.finish is not None:
                        outcome, times = piece.finish.reason.value, piece.finish.times
                        # A stop string: the engine need not go on while the last message is sent.
                        await deltas.aclose()
                    if not piece.empty:
                        yield piece
                    if piece.finish is not None:
                        break
        except ServerError as error:
            outcome = error.code.lower()
            raise
        except Exception:
            outcome = InternalError.code.lower()
            raise
        finally:
            # A caller that is gone closes this generator, or cancels the task that runs it.
            if outcome is None:
                outcome = code_of_cancellation(context).lower()
            total = progress.elapsed()
            self._metrics.observe_request(
                request,
                outcome=outcome,
                completion_tokens=answer.num_tokens,
                seconds=total,
                seconds_after_first_token=total - (progress.first_token_s or total),
                times=times,
            )


def _finish(
    piece: Piece, request: Request, answer: Answer, progress: _Progress
) -> generation_pb2.Finish | None:
    if piece.finish is None:
        return None
    total = progress.elapsed()
    return convert.to_finish(
        piece.finish,
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=answer.num_tokens,
        first_token_s=progress.first_token_s or total,
        total_s=total,
    )
