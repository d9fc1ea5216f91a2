"""Batches with both clients, against a real gRPC server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2

from loraplex.errors import InternalError, InvalidRequestError, UnavailableError
from loraplex.v1 import generation_pb2

PROMPTS = ["a", ("b", {"max_tokens": 2}), [7, 8], "d"]


def backwards(request: Any, context: Any) -> Iterator[Any]:
    """Answers the last prompt first; refuses the one of token ids."""
    for position in reversed(range(len(request.requests))):
        asked = request.requests[position]
        made = generation_pb2.GenerateBatchResponse(position=position)
        if asked.HasField("token_ids"):
            made.error.code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
            made.error.message = "no such token"
            violation = error_details_pb2.BadRequest.FieldViolation(field="token_ids", description="bad")
            packed = any_pb2.Any()
            packed.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
            made.error.details.append(packed)
        else:
            made.answer.text = f"{asked.text}{asked.stopping.max_tokens}"
            made.answer.request_id = "r"
            made.answer.finish.reason = generation_pb2.FINISH_REASON_STOP
        yield made


@pytest.fixture
def batching(server: Any) -> Any:
    server.answers["GenerateBatch"] = backwards
    return server


def test_results_come_as_they_finish(drive: Any, batching: Any, client: Any) -> None:
    stream = drive(lambda: client.stream_batch(PROMPTS, max_tokens=9))
    found = [drive.next(stream) for _ in PROMPTS]
    assert drive.next(stream) is None
    assert [result.position for result in found] == [3, 2, 1, 0]
    assert [result.answer and result.answer.text for result in found] == ["d9", None, "b2", "a9"]
    assert [result.unwrap().finish_reason for result in found if result.error is None] == ["stop"] * 3
    error = found[1].error
    assert isinstance(error, InvalidRequestError)
    assert (str(error), error.code) == ("no such token; token_ids: bad", "INVALID_ARGUMENT")
    assert error.field_violations[0].field == "token_ids"
    with pytest.raises(InvalidRequestError):
        found[1].unwrap()
    assert [len(request.adapters) for request in batching.requests[-1].requests] == [0] * 4


def test_collected_they_are_in_order(drive: Any, batching: Any, client: Any) -> None:
    stream = drive(lambda: client.stream_batch(PROMPTS))
    first, second, third, last = drive(stream.collect)
    assert (first.text, second.text, last.text) == ("a0", "b2", "d0")
    assert isinstance(third, InvalidRequestError)


def test_a_batch_cut_short_or_lost_is_an_error(drive: Any, batching: Any, client: Any) -> None:
    batching.answers["GenerateBatch"] = lambda request, context: list(backwards(request, context))[:2]
    stream = drive(lambda: client.stream_batch(PROMPTS))
    with pytest.raises(InternalError, match="without 2 of its results"):
        drive(stream.collect)

    def gone(request: Any, context: Any) -> Iterator[Any]:
        yield next(backwards(request, context))
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    batching.answers["GenerateBatch"] = gone
    stream = drive(lambda: client.stream_batch(PROMPTS))
    assert drive.next(stream).position == 3
    with pytest.raises(UnavailableError):
        drive.next(stream)


def test_leaving_early_cancels_the_batch(drive: Any, batching: Any, client: Any) -> None:
    first = generation_pb2.GenerateBatchResponse(position=0)
    first.answer.text = "x"
    batching.answers["GenerateBatch"] = lambda request, context: batching.hold(context, first)
    stream = drive(lambda: client.stream_batch(PROMPTS))
    assert drive.next(stream).unwrap().text == "x"
    drive(stream.close)
    assert batching.cancelled.wait(60)


def test_wrong_options_are_found_before_anything_is_sent(drive: Any, batching: Any, client: Any) -> None:
    with pytest.raises(InvalidRequestError):
        drive(lambda: client.stream_batch(["a", ("b", {"max_tokens": "many"})]))
    assert not batching.calls["GenerateBatch"]
