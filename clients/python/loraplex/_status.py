"""From a failed gRPC call to the SDK's error: a table, and the details that come with the status."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loraplex import errors
from loraplex.errors import LoraplexError
from loraplex.v1 import generation_pb2

ERROR_BY_CODE: dict[grpc.StatusCode, type[LoraplexError]] = {
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.UNKNOWN: errors.InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPreconditionError,
    grpc.StatusCode.ABORTED: errors.AbortedError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnimplementedError,
    grpc.StatusCode.INTERNAL: errors.InternalError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DATA_LOSS: errors.InternalError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
}


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_from_call(call: Any, request_id: str = "") -> LoraplexError:
    """The error for a failed call, which is a `grpc.RpcError` that also answers code() and details()."""
    code: grpc.StatusCode = call.code()
    details = _details(call)
    details["request_id"] = (
        request_id or details.get("request_id") or details["metadata"].get("request_id", "")
    )
    return ERROR_BY_CODE[code](call.details() or code.name, code=code.name, **details)


def error_from_message(message: generation_pb2.RequestError, request_id: str = "") -> LoraplexError:
    """The error for one request of a batch, whose call goes on."""
    code = _CODES.get(message.code, grpc.StatusCode.UNKNOWN)
    found: dict[str, Any] = {"metadata": {}}
    for packed in message.details:
        _read_detail(packed, found)
    found["request_id"] = request_id or found.get("request_id") or found["metadata"].get("request_id", "")
    return ERROR_BY_CODE[code](message.message or code.name, code=code.name, **found)


def _details(call: Any) -> dict[str, Any]:
    """The google.rpc details of the status as arguments of LoraplexError."""
    found: dict[str, Any] = {"metadata": {}}
    try:
        status = rpc_status.from_call(call)
        if status is None:
            return found
        for packed in status.details:
            _read_detail(packed, found)
    except (ValueError, DecodeError):
        # Whatever stands between may rewrite a status and leave its old details; the code counts.
        return {"metadata": {}}
    return found


def _read_detail(packed: Any, found: dict[str, Any]) -> None:
    if packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
        bad_request = error_details_pb2.BadRequest()
        packed.Unpack(bad_request)
        found["field_violations"] = [
            errors.FieldViolation(v.field, v.description) for v in bad_request.field_violations
        ]
    elif packed.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR):
        failure = error_details_pb2.PreconditionFailure()
        packed.Unpack(failure)
        found["precondition_violations"] = [
            errors.PreconditionViolation(v.type, v.subject, v.description) for v in failure.violations
        ]
    elif packed.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
        info = error_details_pb2.ResourceInfo()
        packed.Unpack(info)
        found["resource"] = errors.Resource(info.resource_type, info.resource_name, info.description)
    elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
        retry = error_details_pb2.RetryInfo()
        packed.Unpack(retry)
        found["retry_after_s"] = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    elif packed.Is(error_details_pb2.RequestInfo.DESCRIPTOR):
        request = error_details_pb2.RequestInfo()
        packed.Unpack(request)
        found["request_id"] = request.request_id
    elif packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
        reason = error_details_pb2.ErrorInfo()
        packed.Unpack(reason)
        found["reason"] = reason.reason
        found["metadata"] = dict(reason.metadata)
