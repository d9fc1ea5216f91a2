"""Reads and checks the body of a request: bounded in size and time, JSON, with the fields of `schema`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from loraplex_server.api.http.errors import HttpError
from loraplex_server.api.http.events import ClientGoneError
from loraplex_server.api.http.schema import GenerationBody
from loraplex_server.api.http.unserved import Unserved, without_unserved
from loraplex_server.core.errors import InvalidArgumentError

_READ_S = 30.0
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`")
_MISSING = re.compile(r"^Object missing required field `(.*)`")
_CONTENT_TYPE = "application/json"

BodyT = TypeVar("BodyT", bound=GenerationBody)


async def read_body(
    request: Request, kind: type[BodyT], unserved: Mapping[str, Unserved], max_bytes: int
) -> BodyT:
    """The request's body, as `kind`.

    Raises:
        HttpError: it is no JSON by its type, too long, or does not arrive.
        InvalidArgumentError: it is malformed, or a field is wrong; the first one found is named.
        ClientGoneError: the client has hung up.
    """
    # A page in a browser can send other types anywhere without being asked; this one needs permission.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _CONTENT_TYPE:
        raise HttpError(415, "INVALID_ARGUMENT", f"send the body as content-type {_CONTENT_TYPE}")
    try:
        raw = await asyncio.wait_for(_read(request, max_bytes), _READ_S)
    except TimeoutError as error:
        raise HttpError(408, "DEADLINE_EXCEEDED", f"the body did not arrive within {_READ_S:g} s") from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return parse_body(raw, kind, unserved)


def parse_body(raw: bytes, kind: type[BodyT], unserved: Mapping[str, Unserved]) -> BodyT:
    """Raises: InvalidArgumentError."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as error:
        raise InvalidArgumentError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidArgumentError("the body is no JSON object")
    body = without_unserved(body, unserved)
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from error


async def _read(request: Request, max_bytes: int) -> bytes:
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > max_bytes:
            raise HttpError(
                413, "INVALID_ARGUMENT", f"the body has more than {max_bytes} bytes (--max-message-bytes)"
            )
        parts.append(part)
    return b"".join(parts)


def _wrong_field(text: str) -> InvalidArgumentError:
    """msgspec says what is wrong and where in one text."""
    found = _PATH.search(text)
    path = found[1] if found else ""
    text = text[: found.start()] if found else text
    for pattern, description in ((_UNKNOWN, "is no field of this request"), (_MISSING, "is missing")):
        if match := pattern.match(text):
            return InvalidArgumentError.field(f"{path}.{match[1]}".lstrip("."), description)
    return InvalidArgumentError.field(path or "body", text[:1].lower() + text[1:])
