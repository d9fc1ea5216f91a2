"""`POST /v1/completions` and `POST /v1/chat/completions`: whole answers and streams of them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from loraplex.v1 import generation_pb2
from loraplex_server.api.http import unserved
from loraplex_server.api.http.body import BodyT, read_body
from loraplex_server.api.http.chat_format import ChatFormat
from loraplex_server.api.http.completion_format import CompletionFormat
from loraplex_server.api.http.errors import to_body, under
from loraplex_server.api.http.events import (
    ClientGoneError,
    EventStream,
    Receive,
    Send,
    while_connected,
)
from loraplex_server.api.http.formats import Format, Heading, usage_of, wants_usage
from loraplex_server.api.http.schema import ChatBody, CompletionBody, GenerationBody
from loraplex_server.api.http.translate import chat_messages, completion_messages
from loraplex_server.api.http.unserved import Unserved
from loraplex_server.api.requests.intake import Accepted
from loraplex_server.api.requests.limits import Limits
from loraplex_server.api.services import Services
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core import log
from loraplex_server.core.errors import ErrorInfo, InternalError, InvalidArgumentError, ServerError

_log = logging.getLogger(__name__)

MODEL_KEY = "loraplex.model"
"""Key of the request's `model` in the scope, for the text of errors."""


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """Settings of the endpoints.

    Attributes:
        model_name: the base model's, as clients name it.
        max_body_bytes: longest request.
        stall_s: a stream that has not been read for so long ends; 0 is never.
    """

    model_name: str
    max_body_bytes: int
    stall_s: float


@dataclasses.dataclass(frozen=True)
class Kind(Generic[BodyT]):
    """One of the two kinds of generation.

    Attributes:
        body: the type of its requests.
        unserved: fields of OpenAI's API that it does not serve.
        messages: of a body, one for each prompt; the base model has this name.
        formatted: how its answers are written; the tokenizer is that of their text.
    """

    body: type[BodyT]
    unserved: Mapping[str, Unserved]
    messages: Callable[[BodyT, str, Limits], list[generation_pb2.GenerateRequest]]
    formatted: Callable[[BodyT, Heading, Tokenizer], Format]


COMPLETIONS = Kind(CompletionBody, unserved.COMPLETION, completion_messages, CompletionFormat)
CHAT = Kind(ChatBody, unserved.CHAT, chat_messages, ChatFormat)


class _Job(NamedTuple):
    """A request that was accepted, and the format of its answers."""

    body: GenerationBody
    accepted: list[Accepted]
    format: Format


class GenerationEndpoint:
    """An ASGI application that answers requests of one kind.

    A client that hangs up ends its requests in the engine. Errors are raised while they can still become a
    status; later they are a stream's last event.
    """

    def __init__(self, kind: Kind[Any], services: Services, settings: HttpSettings) -> None:
        self._kind = kind
        self._lifecycle = services.lifecycle
        self._intake = services.intake
        self._generator = services.generator
        self._metrics = services.metrics
        self._settings = settings

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body: GenerationBody = await read_body(
            request, self._kind.body, self._kind.unserved, self._settings.max_body_bytes
        )
        scope[MODEL_KEY] = body.model
        messages = self._kind.messages(body, self._settings.model_name, self._lifecycle.backend.limits)
        if body.stream:
            answer = self._stream(body, messages, send)
        else:
            answer = self._whole(body, messages, scope, receive, send)
        try:
            await while_connected(receive, answer)
        except InvalidArgumentError as error:
            if body.response_format is None:
                raise
            raise under(error, "structure.json_schema", "response_format.json_schema.schema") from error

    async def _accept(self, body: GenerationBody, messages: Sequence[generation_pb2.GenerateRequest]) -> _Job:
        accepted = [await self._intake.accept(message) for message in messages]
        checksum = self._lifecycle.backend.engine.info.weight_checksum
        heading = Heading(log.request_id.get(), body.model, f"fp_{checksum[:12]}")
        return _Job(body, accepted, self._kind.formatted(body, heading, accepted[0].tokenizer))

    async def _whole(
        self,
        body: GenerationBody,
        messages: Sequence[generation_pb2.GenerateRequest],
        scope: Any,
        receive: Receive,
        send: Send,
    ) -> None:
        job = await self._accept(body, messages)
        answers = await self._generator.whole(job.accepted, _cancelled)
        written = job.format.whole(answers, usage_of([each.finished for each in answers], body.n or 1))
        await Response(written, media_type="application/json")(scope, receive, send)

    async def _stream(
        self, body: GenerationBody, messages: Sequence[generation_pb2.GenerateRequest], send: Send
    ) -> None:
        events = EventStream(send, self._settings.stall_s)
        try:
            await self._send_events(await self._accept(body, messages), events)
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
            await events.event(to_body(info, log.request_id.get(), body.model))
            await events.end(b"")

    async def _send_events(self, job: _Job, events: EventStream) -> None:
        ends = {}
        async with contextlib.aclosing(self._generator.run(job.accepted, _cancelled)) as outputs:
            async for index, piece, end in outputs:
                if end is not None:
                    ends[index] = end
                for event in job.format.events(index, piece, end):
                    await events.event(event)
        if wants_usage(job.body):
            usage = usage_of([ends[index] for index in sorted(ends)], job.body.n or 1)
            await events.event(job.format.usage_event(usage))
        await events.end()


def _cancelled() -> str:
    """The outcome of an answer whose client hung up."""
    return "cancelled"
