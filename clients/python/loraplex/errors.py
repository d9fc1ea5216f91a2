"""The errors that the SDK raises.

    LoraplexError
    ├── InvalidRequestError      INVALID_ARGUMENT     an argument is wrong; `field_violations` says which
    │                            OUT_OF_RANGE
    ├── UnauthenticatedError     UNAUTHENTICATED      no token, or one the server does not know
    ├── PermissionDeniedError    PERMISSION_DENIED    not allowed, such as a source outside the roots
    ├── NotFoundError            NOT_FOUND            no such adapter or folder; `resource` names it
    ├── AlreadyExistsError       ALREADY_EXISTS       the name is taken
    ├── FailedPreconditionError  FAILED_PRECONDITION  the adapter does not fit, alone or with the others
    ├── AbortedError             ABORTED              lost against a concurrent change; start again
    ├── ResourceExhaustedError   RESOURCE_EXHAUSTED   the queue is full; `retry_after_s` says for how long
    ├── RequestCancelledError    CANCELLED            the call was cancelled, or its client closed
    ├── DeadlineExceededError    DEADLINE_EXCEEDED    `timeout` passed first; `phase` says which of its limits
    ├── UnavailableError         UNAVAILABLE          no server there, or it is starting or draining
    ├── UnimplementedError       UNIMPLEMENTED        the server is older than this SDK
    └── InternalError            INTERNAL, UNKNOWN    the server failed
                                 DATA_LOSS

Errors found before anything is sent (an argument of the wrong type, two that exclude each other)
are InvalidRequestError as well, so that one `except LoraplexError` covers a call.

>>> with Client("127.0.0.1:50051") as client:
...     try:
...         client.generate("hello", adapter="nobody", top_p=2)
...     except InvalidRequestError as error:
...         print(error.code, [violation.field for violation in error.field_violations])
...     try:
...         client.generate("hello", adapter="nobody")
...     except NotFoundError as error:
...         print(error.resource.type, error.resource.name, error.reason)
INVALID_ARGUMENT ['sampling.top_p']
adapter nobody ADAPTER_NOT_FOUND
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FieldViolation",
    "InternalError",
    "InvalidRequestError",
    "LoraplexError",
    "NotFoundError",
    "PermissionDeniedError",
    "PreconditionViolation",
    "RequestCancelledError",
    "Resource",
    "ResourceExhaustedError",
    "TimeoutPhase",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]


TimeoutPhase = Literal["connect", "first_token", "between_tokens", "total"]
"""Which limit of `loraplex.Timeouts` passed."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field that was wrong, as a path in the request (`sampling.top_p`), and what to do about it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class PreconditionViolation:
    """What did not hold, and of what: for example an adapter's tensor that does not fit the base model."""

    type: str
    subject: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """The thing that the error is about: type `adapter`, name `sql`."""

    type: str
    name: str
    description: str = ""


class LoraplexError(Exception):
    """Base of all errors of the SDK.

    Attributes:
        code: name of the gRPC status, such as `NOT_FOUND`.
        message: the server's text.
        field_violations: the fields that were wrong.
        precondition_violations: what did not hold.
        resource: what the error is about.
        retry_after_s: seconds after which a retry may succeed; None when the server did not say.
        reason: a constant that programs can compare; empty when the server gave none.
        metadata: further facts that came with the reason.
        request_id: of the request that failed; empty when neither side had named it.
    """

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        field_violations: Sequence[FieldViolation] = (),
        precondition_violations: Sequence[PreconditionViolation] = (),
        resource: Resource | None = None,
        retry_after_s: float | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.message = message
        self.field_violations = tuple(field_violations)
        self.precondition_violations = tuple(precondition_violations)
        self.resource = resource
        self.retry_after_s = retry_after_s
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.request_id = request_id

    def __str__(self) -> str:
        """The message, and the details that it does not contain already."""
        text = self.message
        for violation in self.field_violations:
            if violation.description not in text:
                text += f"; {violation.field}: {violation.description}"
        for broken in self.precondition_violations:
            if broken.description not in text:
                text += f"; {broken.subject}: {broken.description}"
        if self.resource is not None and self.resource.name not in text:
            text += f" ({self.resource.type} {self.resource.name!r})"
        if self.retry_after_s is not None:
            text += f" (retry after {self.retry_after_s:g} s)"
        if self.request_id:
            text += f" [request {self.request_id}]"
        return text


class InvalidRequestError(LoraplexError):
    """An argument is wrong."""

    default_code = "INVALID_ARGUMENT"

    @classmethod
    def for_field(cls, field: str, description: str) -> InvalidRequestError:
        """The error for one argument, found by the SDK before anything was sent."""
        return cls(f"{field}: {description}", field_violations=[FieldViolation(field, description)])


class UnauthenticatedError(LoraplexError):
    """The server wants a token, or does not know this one."""

    default_code = "UNAUTHENTICATED"


class PermissionDeniedError(LoraplexError):
    """The caller may not do this."""

    default_code = "PERMISSION_DENIED"


class NotFoundError(LoraplexError):
    """The adapter, or the folder it should be loaded from, does not exist."""

    default_code = "NOT_FOUND"


class AlreadyExistsError(LoraplexError):
    """Another adapter is registered under that name."""

    default_code = "ALREADY_EXISTS"


class FailedPreconditionError(LoraplexError):
    """The adapter does not fit this base model, or cannot be served with the others."""

    default_code = "FAILED_PRECONDITION"


class AbortedError(LoraplexError):
    """A concurrent change came first."""

    default_code = "ABORTED"


class ResourceExhaustedError(LoraplexError):
    """The server's queue or memory is full."""

    default_code = "RESOURCE_EXHAUSTED"


class RequestCancelledError(LoraplexError):
    """The call was cancelled: by the server, by closing its stream, or with its client."""

    default_code = "CANCELLED"


class DeadlineExceededError(LoraplexError):
    """The timeout passed before the answer was complete.

    Attributes:
        phase: "connect", "first_token", "between_tokens" or "total".
    """

    default_code = "DEADLINE_EXCEEDED"
    phase: TimeoutPhase = "total"

    @classmethod
    def in_phase(cls, phase: TimeoutPhase, message: str, *, request_id: str = "") -> DeadlineExceededError:
        """The error where the SDK itself has waited long enough."""
        error = cls(message, request_id=request_id)
        error.phase = phase
        return error


class UnavailableError(LoraplexError):
    """No server could be reached, or it is starting or draining."""

    default_code = "UNAVAILABLE"


class UnimplementedError(LoraplexError):
    """The server does not have this method."""

    default_code = "UNIMPLEMENTED"


class InternalError(LoraplexError):
    """The server failed, or broke the protocol."""

    default_code = "INTERNAL"
