"""Every status and its details arrive as the SDK's errors, and nothing of gRPC gets out."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

from loraplex import errors
from loraplex._status import ERROR_BY_CODE
from loraplex.errors import LoraplexError
from loraplex.v1 import generation_pb2

SAFETY_S = 60.0
EXPECTED = {
    "CANCELLED": errors.RequestCancelledError,
    "UNKNOWN": errors.InternalError,
    "INVALID_ARGUMENT": errors.InvalidRequestError,
    "DEADLINE_EXCEEDED": errors.DeadlineExceededError,
    "NOT_FOUND": errors.NotFoundError,
    "ALREADY_EXISTS": errors.AlreadyExistsError,
    "PERMISSION_DENIED": errors.PermissionDeniedError,
    "RESOURCE_EXHAUSTED": errors.ResourceExhaustedError,
    "FAILED_PRECONDITION": errors.FailedPreconditionError,
    "ABORTED": errors.AbortedError,
    "OUT_OF_RANGE": errors.InvalidRequestError,
    "UNIMPLEMENTED": errors.UnimplementedError,
    "INTERNAL": errors.InternalError,
    "UNAVAILABLE": errors.UnavailableError,
    "DATA_LOSS": errors.InternalError,
    "UNAUTHENTICATED": errors.UnauthenticatedError,
}

DETAILS = [
    error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field="sampling.top_p", description="must be in (0, 1]"
            )
        ]
    ),
    error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(
                type="SHAPE", subject="lora_A", description="has 8 columns, the base has 16"
            )
        ]
    ),
    error_details_pb2.ResourceInfo(resource_type="adapter", resource_name="sql", description="missing"),
    error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
    error_details_pb2.ErrorInfo(reason="WHY", domain="loraplex", metadata={"request_id": "r9", "slots": "3"}),
    error_details_pb2.Help(),  # a kind that the SDK does not know
]


def test_the_table_knows_every_code() -> None:
    assert set(EXPECTED) == {code.name for code in grpc.StatusCode} - {"OK"}
    assert {code.name: kind for code, kind in ERROR_BY_CODE.items()} == EXPECTED


def test_every_error_class_is_exported_drawn_and_reachable() -> None:
    subclasses = set(LoraplexError.__subclasses__())
    assert subclasses == set(ERROR_BY_CODE.values())
    for kind in subclasses:
        assert kind.__name__ in errors.__all__
        assert f"── {kind.__name__} " in (errors.__doc__ or "")
        assert EXPECTED[kind.default_code] is kind


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_each_code(drive: Any, server: Any, abort: Any, connect: Any, code: grpc.StatusCode) -> None:
    client = connect(retry=None)
    server.answers["Generate"] = lambda request, context: abort(context, code, "it failed", *DETAILS)
    server.answers["GetModel"] = server.answers["Generate"]
    for act in (
        lambda: client.generate("x"),
        lambda: client.stream("x").collect(),
        lambda: client.model(),
    ):
        with pytest.raises(LoraplexError) as caught:
            drive(act)
        error = caught.value
        assert type(error) is EXPECTED[code.name]
        assert error.code == code.name
        assert error.message == "it failed"
        assert error.field_violations == (errors.FieldViolation("sampling.top_p", "must be in (0, 1]"),)
        assert error.precondition_violations == (
            errors.PreconditionViolation("SHAPE", "lora_A", "has 8 columns, the base has 16"),
        )
        assert error.resource == errors.Resource("adapter", "sql", "missing")
        assert error.retry_after_s == 1.5
        assert error.reason == "WHY"
        assert error.metadata == {"request_id": "r9", "slots": "3"}
        assert error.request_id == "r9"


def test_an_error_has_the_id_under_which_the_server_logs_it(
    drive: Any, server: Any, abort: Any, client: Any
) -> None:
    named = error_details_pb2.RequestInfo(request_id="made-by-server")
    server.answers["Generate"] = lambda request, context: abort(
        context, grpc.StatusCode.NOT_FOUND, "missing", named
    )
    with pytest.raises(errors.NotFoundError) as caught:
        drive(lambda: client.generate("x"))
    assert caught.value.request_id == "made-by-server"


def test_the_text_tells_all(drive: Any, server: Any, abort: Any, client: Any) -> None:
    server.answers["Generate"] = lambda request, context: abort(
        context, grpc.StatusCode.INVALID_ARGUMENT, "bad request", *DETAILS
    )
    with pytest.raises(LoraplexError) as caught:
        drive(lambda: client.generate("x", request_id="mine"))
    assert str(caught.value) == (
        "bad request; sampling.top_p: must be in (0, 1]; lora_A: has 8 columns, the base has 16 "
        "(adapter 'sql') (retry after 1.5 s) [request mine]"
    )


def test_the_text_does_not_repeat_the_message() -> None:
    error = errors.InvalidRequestError.for_field("top_p", "must be in (0, 1]")
    assert str(error) == "top_p: must be in (0, 1]"


def test_an_error_without_details_or_text(drive: Any, server: Any, client: Any) -> None:
    server.answers["Generate"] = lambda request, context: context.abort(grpc.StatusCode.NOT_FOUND, "")
    with pytest.raises(errors.NotFoundError, match=r"^NOT_FOUND$") as caught:
        drive(lambda: client.generate("x"))
    assert caught.value.field_violations == ()
    assert caught.value.resource is caught.value.retry_after_s is None


@pytest.mark.parametrize("garbage", [b"\xff\xff not a status", b"\x08\x05\x12\x05other"])
def test_impossible_details_are_left_out(drive: Any, server: Any, client: Any, garbage: bytes) -> None:
    def answer(request: Any, context: Any) -> None:
        context.set_trailing_metadata([("grpc-status-details-bin", garbage)])
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    server.answers["Generate"] = answer
    with pytest.raises(errors.ResourceExhaustedError, match=r"^full$") as caught:
        drive(lambda: client.generate("x"))
    assert caught.value.metadata == {}


def test_an_exception_in_the_server(drive: Any, server: Any, client: Any) -> None:
    def answer(request: Any, context: Any) -> Any:
        yield generation_pb2.GenerateResponse(text="a", request_id="r1")
        raise ValueError("oh")

    server.answers["Generate"] = answer
    stream = drive(lambda: client.stream("x"))
    assert drive.next(stream).text == "a"
    with pytest.raises(errors.InternalError, match="oh") as caught:
        drive.next(stream)
    assert caught.value.request_id == "r1", "learnt from the first chunk"


def test_errors_survive_pickling() -> None:
    error = errors.ResourceExhaustedError(
        "full", retry_after_s=2.0, resource=errors.Resource("queue", "q"), request_id="r"
    )
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_every_error_of_the_server_arrives_with_its_reason(drive: Any, server: Any, connect: Any) -> None:
    """As the server itself writes them: class, reason, and how long to wait."""
    from loraplex_server.api.rpc.status import to_status
    from loraplex_server.core import errors as ours

    kinds = [kind for kind in ours.ServerError.__subclasses__() if kind.__module__ == ours.__name__]
    cases = [(kind, reason) for kind in kinds for reason in ("", *ours.Reason)]
    client, raised = connect(retry=None), []
    server.answers["GetModel"] = lambda request, context: context.abort_with_status(
        to_status(raised[-1].info, "r7")
    )
    for kind, reason in cases:
        raised.append(kind("a text", resource=("kind", "name"), retry_after_s=2.5, reason=reason))
        with pytest.raises(EXPECTED[kind.code]) as caught:
            drive(lambda: client.model(timeout=SAFETY_S))
        error = caught.value
        known = "" if kind.code == "INTERNAL" else reason
        assert (error.code, error.reason) == (kind.code, known or kind.code)
        if kind.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            assert error.retry_after_s == 2.5
