"""Errors of requests, adapters and settings.

    ServerError                  code
    ├── InvalidArgumentError     INVALID_ARGUMENT
    ├── NotFoundError            NOT_FOUND
    ├── AlreadyExistsError       ALREADY_EXISTS
    ├── UnauthenticatedError     UNAUTHENTICATED
    ├── PermissionDeniedError    PERMISSION_DENIED
    ├── FailedPreconditionError  FAILED_PRECONDITION
    ├── ResourceExhaustedError   RESOURCE_EXHAUSTED    with `retry_after_s`
    ├── DeadlineExceededError    DEADLINE_EXCEEDED
    ├── CancelledError           CANCELLED
    ├── UnavailableError         UNAVAILABLE           with `retry_after_s`
    ├── UnimplementedError       UNIMPLEMENTED
    └── InternalError            INTERNAL

`core.reasons` says when each is raised and what to do about it. An error travels from the engine to the API
as an `ErrorInfo`; the API turns it back into the same class. This module does not depend on gRPC or HTTP:
`api.rpc.status` and `api.http.errors` map the codes.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Sequence

import msgspec

# gRPC sends a status in HTTP/2 trailers, which clients limit to 8 KiB.
_MAX_VIOLATIONS = 16


class Reason(enum.StrEnum):
    """A reason that a program may act on, finer than the status code.

    Clients see the code's name as the reason of an error that has none. Reasons are part of the API: never
    rename one that clients know, nor change its meaning.
    """

    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    SOURCE_NOT_FOUND = "SOURCE_NOT_FOUND"
    ADAPTER_EXISTS = "ADAPTER_EXISTS"
    SOURCE_NOT_ALLOWED = "SOURCE_NOT_ALLOWED"
    UPLOADS_NOT_ALLOWED = "UPLOADS_NOT_ALLOWED"
    ADAPTER_NOT_SERVABLE = "ADAPTER_NOT_SERVABLE"
    ADAPTERS_NOT_ADDABLE = "ADAPTERS_NOT_ADDABLE"
    NO_ROOM_TO_PIN = "NO_ROOM_TO_PIN"
    NO_CHAT_TEMPLATE = "NO_CHAT_TEMPLATE"
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_JOBS = "TOO_MANY_JOBS"
    TOO_MANY_ADAPTERS = "TOO_MANY_ADAPTERS"
    CACHE_FULL = "CACHE_FULL"
    DISK_FULL = "DISK_FULL"
    READER_TOO_SLOW = "READER_TOO_SLOW"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    ADAPTER_UNLOADED = "ADAPTER_UNLOADED"
    SERVER_STARTING = "SERVER_STARTING"
    SERVER_DRAINING = "SERVER_DRAINING"
    ENGINE_RESTARTING = "ENGINE_RESTARTING"
    ENGINE_LOST = "ENGINE_LOST"


class FieldViolation(msgspec.Struct, frozen=True):
    """One bad field: its path in the request, and what to do about it."""

    field: str
    description: str


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as plain data.

    Attributes:
        code: name of its gRPC status.
        violations: the bad fields, for INVALID_ARGUMENT.
        resource: kind and name of the thing that is missing or in conflict, for example ("adapter", "sql").
        retry_after_s: seconds to wait before trying again; None if waiting does not help or is not needed.
        reason: a `Reason`, or "" where the code is precise enough.
    """

    code: str
    message: str
    violations: tuple[FieldViolation, ...] = ()
    resource: tuple[str, str] | None = None
    retry_after_s: float | None = None
    reason: str = ""


class ServerError(Exception):
    """Base class of the errors; only subclasses are raised."""

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        resource: tuple[str, str] | None = None,
        retry_after_s: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(self.code, message, violations, resource, retry_after_s, reason)


class InvalidArgumentError(ServerError):
    """A field of a request is wrong."""

    code = "INVALID_ARGUMENT"

    @classmethod
    def field(cls, field: str, description: str) -> InvalidArgumentError:
        """An error about one field; `description` says what to do about it."""
        return cls.fields([FieldViolation(field, description)])

    @classmethod
    def fields(cls, found: Sequence[FieldViolation]) -> InvalidArgumentError:
        """An error about several fields; it names the first 16, because clients limit a status to 8 KiB."""
        shown = tuple(found[:_MAX_VIOLATIONS])
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in shown)
        if len(found) > len(shown):
            message += f"; and {len(found) - len(shown)} more"
        return cls(message, violations=shown)


class NotFoundError(ServerError):
    code = "NOT_FOUND"


class AlreadyExistsError(ServerError):
    code = "ALREADY_EXISTS"


class UnauthenticatedError(ServerError):
    code = "UNAUTHENTICATED"


class PermissionDeniedError(ServerError):
    code = "PERMISSION_DENIED"


class FailedPreconditionError(ServerError):
    code = "FAILED_PRECONDITION"


class ResourceExhaustedError(ServerError):
    code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(ServerError):
    code = "DEADLINE_EXCEEDED"


class CancelledError(ServerError):
    code = "CANCELLED"


class UnavailableError(ServerError):
    code = "UNAVAILABLE"


class UnimplementedError(ServerError):
    code = "UNIMPLEMENTED"


class InternalError(ServerError):
    code = "INTERNAL"


_BY_CODE: dict[str, type[ServerError]] = {
    cls.code: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        UnauthenticatedError,
        PermissionDeniedError,
        FailedPreconditionError,
        ResourceExhaustedError,
        DeadlineExceededError,
        CancelledError,
        UnavailableError,
        UnimplementedError,
        InternalError,
    )
}


def from_info(info: ErrorInfo) -> ServerError:
    """The error that `info` describes, as its original class; InternalError if the code is unknown."""
    return _BY_CODE.get(info.code, InternalError)(
        info.message,
        violations=info.violations,
        resource=info.resource,
        retry_after_s=info.retry_after_s,
        reason=info.reason,
    )


def disk_error(what: str, error: OSError) -> ResourceExhaustedError | UnavailableError:
    """The error for a failed write: ResourceExhaustedError if the disk is full, else UnavailableError.

    Args:
        what: the operator's name for what the disk holds, for the text.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceExhaustedError(
            f"the disk of {what} is full",
            resource=("disk", what),
            retry_after_s=60.0,
            reason=Reason.DISK_FULL,
        )
    return UnavailableError(f"the disk of {what} failed: {error.strerror}")
