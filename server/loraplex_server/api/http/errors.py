"""From the server's errors to HTTP: a status, and a body as OpenAI's clients understand it."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import msgspec

from loraplex_server.api.http.schema import ErrorBody, ErrorDetail
from loraplex_server.core.errors import ErrorInfo, FieldViolation, InvalidArgumentError, ServerError


class HttpStatus(NamedTuple):
    """An HTTP status, and the type of error that OpenAI's clients read beside it."""

    status: int
    type: str


STATUSES = {
    "INVALID_ARGUMENT": HttpStatus(400, "invalid_request_error"),
    "NOT_FOUND": HttpStatus(404, "invalid_request_error"),
    "ALREADY_EXISTS": HttpStatus(409, "invalid_request_error"),
    "UNAUTHENTICATED": HttpStatus(401, "authentication_error"),
    "PERMISSION_DENIED": HttpStatus(403, "permission_error"),
    "FAILED_PRECONDITION": HttpStatus(400, "invalid_request_error"),
    "RESOURCE_EXHAUSTED": HttpStatus(429, "rate_limit_error"),
    "DEADLINE_EXCEEDED": HttpStatus(504, "timeout_error"),
    "CANCELLED": HttpStatus(499, "server_error"),
    "UNAVAILABLE": HttpStatus(503, "server_error"),
    "INTERNAL": HttpStatus(500, "server_error"),
}
"""By code. RESOURCE_EXHAUSTED and UNAVAILABLE come with Retry-After; INTERNAL comes without its text, which
may name files."""

_DEFAULT_RETRY_S = 1.0
_MAX_MESSAGE_CHARS = 1000

# Parts of paths in `loraplex.v1.GenerateRequest` that are others in `schema`, and those.
_PATHS = (
    (re.compile(r"^(sampling|stopping|chat)\."), ""),
    (re.compile(r"^(text|token_ids(\.ids)?|prompt)(?=$|\[)"), "prompt"),
    (re.compile(r"^chat$"), "messages"),
    (re.compile(r"^(adapters\[\d+\])\.adapter$"), r"\1.name"),
    (re.compile(r"^structure\.choice\.texts$"), "structure.choice"),
)


class HttpError(ServerError):
    """An error that only HTTP can have, with a status of its own."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.info = ErrorInfo(code, message)
        self.status = status


def status_of(error: ServerError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, HttpError):
        return error.status
    return STATUSES.get(error.info.code, STATUSES["INTERNAL"]).status


def to_body(info: ErrorInfo, request_id: str, model: str = "") -> bytes:
    """The JSON body.

    Args:
        model: the request's `model`; where that is the missing adapter, the error names this field.
    """
    code = info.code if info.code in STATUSES else "INTERNAL"
    message, param, reason = info.message, None, code.lower()
    if code == "INTERNAL":
        message = f"internal error; the server's log has it under {request_id}"
    elif info.violations:
        paths = [_path(violation) for violation in info.violations]
        param = paths[0]
        pairs = zip(paths, info.violations, strict=True)
        message = "; ".join(f"{path}: {violation.description}" for path, violation in pairs)
    elif info.resource is not None and info.resource[0] == "adapter" and code == "NOT_FOUND":
        param, reason = "model" if info.resource[1] == model else "adapters", "model_not_found"
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[: _MAX_MESSAGE_CHARS - 1] + "…"
    return msgspec.json.encode(ErrorBody(ErrorDetail(message, STATUSES[code].type, param, reason)))


def under(error: InvalidArgumentError, field: str, instead: str) -> InvalidArgumentError:
    """The error with `field` called `instead`, as HTTP's request has it."""
    violations = tuple(
        msgspec.structs.replace(one, field=instead) if one.field == field else one
        for one in error.info.violations
    )
    return InvalidArgumentError(error.info.message.replace(field, instead), violations=violations)


def headers_of(info: ErrorInfo) -> dict[str, str]:
    """Headers beside the body: when to try again, or how to authenticate."""
    if info.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
        seconds = _DEFAULT_RETRY_S if info.retry_after_s is None else info.retry_after_s
        return {
            "retry-after": str(math.ceil(seconds)),
            # A queue moves in tenths of a second; OpenAI's clients prefer this header.
            "retry-after-ms": str(math.ceil(seconds * 1000)),
        }
    return {"www-authenticate": "Bearer"} if info.code == "UNAUTHENTICATED" else {}


def _path(violation: FieldViolation) -> str:
    path = violation.field
    for pattern, instead in _PATHS:
        path = pattern.sub(instead, path)
    return path
