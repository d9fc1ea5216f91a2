"""Errors a request, an adapter or an operator can meet.

    ServerError                  code        what the caller should do
    ├── InvalidArgumentError     INVALID_ARGUMENT      mend the named field
    ├── NotFoundError            NOT_FOUND             name something that exists
    ├── AlreadyExistsError       ALREADY_EXISTS        choose another name
    ├── UnauthenticatedError     UNAUTHENTICATED       send a token the server knows
    ├── PermissionDeniedError    PERMISSION_DENIED     use an allowed source
    ├── FailedPreconditionError  FAILED_PRECONDITION   change the adapter or the server
    ├── ResourceExhaustedError   RESOURCE_EXHAUSTED    try again after `retry_after_s`
    ├── DeadlineExceededError    DEADLINE_EXCEEDED     allow more time
    ├── CancelledError           CANCELLED             nothing
    ├── UnavailableError         UNAVAILABLE           try again, the server starts or stops
    └── InternalError            INTERNAL              report it

An error travels from the engine to the API as an `ErrorInfo` and becomes the same class there.
This module knows nothing of gRPC; `api/status.py` maps the codes.
"""

from __future__ import annotations

import msgspec


class FieldViolation(msgspec.Struct, frozen=True):
    """One bad field: its path in the request, and what to do about it."""

    field: str
    description: str


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as plain data.

    Attributes:
        code: name of the gRPC status that fits.
        resource: kind and name of what was missing or in the way, for example ("adapter", "sql").
        retry_after_s: seconds after which trying again makes sense.
    """

    code: str
    message: str
    violations: tuple[FieldViolation, ...] = ()
    resource: tuple[str, str] | None = None
    retry_after_s: float | None = None


class ServerError(Exception):
    """Base of all errors above; never raised itself."""

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        violations: tuple[FieldViolation, ...] = (),
        resource: tuple[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(self.code, message, violations, resource, retry_after_s)


class InvalidArgumentError(ServerError):
    """A field of a request is wrong."""

    code = "INVALID_ARGUMENT"

    @classmethod
    def field(cls, field: str, description: str) -> InvalidArgumentError:
        """The usual case: one field, and what to do about it."""
        return cls(f"{field}: {description}", violations=(FieldViolation(field, description),))


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
        InternalError,
    )
}


def from_info(info: ErrorInfo) -> ServerError:
    """The error that `info` describes, as the class it was raised as."""
    return _BY_CODE.get(info.code, InternalError)(
        info.message,
        violations=info.violations,
        resource=info.resource,
        retry_after_s=info.retry_after_s,
    )
