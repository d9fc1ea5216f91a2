"""`POST /v1/completions` and `POST /v1/chat/completions`: whole answers and streams of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from loraplex.v1 import generation_pb2
from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.api.answers.generator import Generator
from loraplex_server.api.answers.merging import merged
from loraplex_server.api.http import unserved
from loraplex_server.api.http.body import read_body
from loraplex_server.api.http.errors import to_body, under
from loraplex_server.api.http.events import (
    ClientGoneError,
    EventStream,
    Receive,
    Send,
    while_connected,
)
from loraplex_server.api.http.formats import (
    ChatFormat,
    Collected,
    CompletionFormat,
    Format,
    Heading,
    usage_of,
)
from loraplex_server.api.http.schema import ChatBody, CompletionBody, GenerationBody
from loraplex_server.api.http.translate import chat_message, completion_messages
from loraplex_server.api.lifecycle import Backend
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo, InternalError, InvalidArgumentError, ServerError

_log = logging.getLogger(__name__)

MODEL_KEY = "loraplex.model"
"""Where the request's `model` is found in the scope, for the text of errors."""


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """What the endpoints need to know.

    Attributes:
        model_name: the base model's, as callers name it.
        max_body_bytes: longest request.
        stall_s: a stream that has not been read for so long ends; 0 is never.
    """

    model_name: str
    max_body_bytes: int
    stall_s: float


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request as understood: a message for each prompt, and how its answers look."""

    body: GenerationBody
    messages: list[generation_pb2.GenerateRequest]
    format: Format


class Kind(Protocol):
    """One of the two kinds of generation."""

    async def read(self, request: Request, backend: Backend, settings: HttpSettings) -> _Job: ...


class Completions:
    """Text continued."""

    async def read(self, request: Request, backend: Backend, settings: HttpSettings) -> _Job:
        body = await read_body(request, CompletionBody, unserved.COMPLETION, settings.max_body_bytes)
        request.scope[MODEL_KEY] = body.model
        messages = completion_messages(body, settings.model_name, backend.limits.defaults)
        looks = CompletionFormat(
            _heading(body, backend),
            await _tokenizer(backend, messages[0]),
            body.n or 1,
            body.logprobs,
            _wants_usage(body),
            echoes=bool(body.echo),
        )
        return _Job(body, messages, looks)


class Chat:
    """Conversations continued."""

    async def read(self, request: Request, backend: Backend, settings: HttpSettings) -> _Job:
        body = await read_body(request, ChatBody, unserved.CHAT, settings.max_body_bytes)
        request.scope[MODEL_KEY] = body.model
        message = chat_message(
            body, settings.model_name, backend.limits.defaults, backend.limits.max_model_len
        )
        token_text = (await _tokenizer(backend, message)).token_text
        looks = ChatFormat(_heading(body, backend), token_text, bool(body.logprobs), _wants_usage(body))
        return _Job(body, [message], looks)


class GenerationEndpoint:
    """An ASGI application that answers requests of one kind.

    A client that hangs up ends its requests in the engine. Errors are raised while they can still become a
    status; later they are a stream's last event.
    """

    def __init__(self, kind: Kind, generator: Generator, settings: HttpSettings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._kind = kind
        self._generator = generator
        self._settings = settings

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        job = await self._kind.read(request, self._generator.backend, self._settings)
        answer = self._stream(job, send) if job.body.stream else self._whole(job, scope, receive, send)
        try:
            await while_connected(receive, answer)
        except InvalidArgumentError as error:
            if job.body.response_format is None:
                raise
            raise under(error, "structure.json_schema", "response_format.json_schema.schema") from error

    async def _outputs(self, job: _Job) -> AsyncGenerator[tuple[int, tuple[Piece, End | None]]]:
        accepted = []
        for message in job.messages:
            accepted += await self._generator.accept(message)
        return merged([self._generator.run(each, lambda: "cancelled") for each in accepted])

    async def _whole(self, job: _Job, scope: Any, receive: Receive, send: Send) -> None:
        choices = job.body.n or 1
        answers = [Collected() for _ in range(len(job.messages) * choices)]
        async with contextlib.aclosing(await self._outputs(job)) as outputs:
            async for index, (piece, end) in outputs:
                answers[index].add(piece, end)
        body = job.format.whole(answers, usage_of(answers, choices))
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, job: _Job, send: Send) -> None:
        events = EventStream(send, self._settings.stall_s)
        try:
            await self._send_events(job, events)
        except ClientGoneError:
            raise
        except Exception as error:
            if not events.started:
                raise
            if not isinstance(error, ServerError):
                _log.exception("a stream failed")
                info = ErrorInfo(InternalError.code, "")
            else:
                _log.info("a stream ends with %s: %s", error.code, error)
                info = error.info
            self._metrics.observe_error(info)
            await events.event(to_body(info, log.request_id.get(), job.body.model))
            await events.end(b"")

    async def _send_events(self, job: _Job, events: EventStream) -> None:
        choices = job.body.n or 1
        answers = [Collected() for _ in range(len(job.messages) * choices)]
        async with contextlib.aclosing(await self._outputs(job)) as outputs:
            async for index, (piece, end) in outputs:
                answers[index].end = end
                for event in job.format.events(index, piece, end):
                    await events.event(event)
        if _wants_usage(job.body):
            await events.event(job.format.usage_event(usage_of(answers, choices)))
        await events.end()


def _heading(body: GenerationBody, backend: Backend) -> Heading:
    checksum = backend.engine.info.weight_checksum
    return Heading(log.request_id.get(), body.model, f"fp_{checksum[:12]}")


async def _tokenizer(backend: Backend, message: generation_pb2.GenerateRequest) -> Tokenizer:
    return (await backend.tokenizers.of([use.adapter for use in message.adapters])).tokenizer


def _wants_usage(body: GenerationBody) -> bool:
    return bool(body.stream and body.stream_options is not None and body.stream_options.include_usage)
