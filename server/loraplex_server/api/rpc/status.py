"""From the server's errors to gRPC statuses with `google.rpc` details."""

from __future__ import annotations

import random
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraplex_server.core.errors import ErrorInfo

_DOMAIN = "loraplex"
_DEFAULT_RETRY_S = 1.0
_CLOCK_SLACK_S = 0.05
_PUSHBACK_JITTER = 0.25
# gRPC limits all trailers of a call to 8 KiB, and the text travels twice.
_MAX_MESSAGE_CHARS = 1000
_MAX_VIOLATION_CHARS = 120


def to_status(error: ErrorInfo, request_id: str) -> grpc.Status:
    """The status to end a call with."""
    result: grpc.Status = rpc_status.to_status(to_message(error, request_id))
    return result


def to_message(error: ErrorInfo, request_id: str) -> status_pb2.Status:
    """The status as a message, with its details.

    An INTERNAL error's own text may name files and is for the log alone: the client gets the id to ask
    about.
    """
    code = error.code if error.code in grpc.StatusCode.__members__ else "INTERNAL"
    message = (
        f"internal error; the server's log has it under {request_id}" if code == "INTERNAL" else error.message
    )
    message = _shorten(message, _MAX_MESSAGE_CHARS)
    reason = code if code == "INTERNAL" else error.reason or code
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if code != "INTERNAL":
        details += _specific(code, error, message)
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def retry_pushback(error: ErrorInfo) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that has gRPC's own retries wait as long as RetryInfo says; a random part on top
    keeps clients that are refused together from coming back together."""
    if error.retry_after_s is None or error.code not in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
        return ()
    pause_s = error.retry_after_s * random.uniform(1.0, 1.0 + _PUSHBACK_JITTER)
    return (("grpc-retry-pushback-ms", str(round(pause_s * 1000))),)


def code_of_cancellation(context: Any) -> str:
    """The code of a call that was cancelled: DEADLINE_EXCEEDED or CANCELLED.

    A client's clock may end the call a moment before the server's would.
    """
    remaining = context.time_remaining()
    return "DEADLINE_EXCEEDED" if remaining is not None and remaining < _CLOCK_SLACK_S else "CANCELLED"


def _specific(code: str, error: ErrorInfo, message: str) -> list[Any]:
    kind, name = error.resource or ("", "")
    match code:
        case "INVALID_ARGUMENT":
            violations = [
                error_details_pb2.BadRequest.FieldViolation(
                    field=violation.field, description=_shorten(violation.description, _MAX_VIOLATION_CHARS)
                )
                for violation in error.violations
            ]
            return [error_details_pb2.BadRequest(field_violations=violations)]
        case "NOT_FOUND" | "ALREADY_EXISTS" | "PERMISSION_DENIED":
            return [
                error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name, description=message)
            ]
        case "FAILED_PRECONDITION":
            violation = error_details_pb2.PreconditionFailure.Violation(
                type=kind, subject=name, description=message
            )
            return [error_details_pb2.PreconditionFailure(violations=[violation])]
        case "RESOURCE_EXHAUSTED":
            quota = error_details_pb2.QuotaFailure.Violation(subject=kind, description=message)
            return [_retry(error), error_details_pb2.QuotaFailure(violations=[quota])]
        case "UNAVAILABLE":
            return [_retry(error)]
    return []


def _retry(error: ErrorInfo) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    seconds = _DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
