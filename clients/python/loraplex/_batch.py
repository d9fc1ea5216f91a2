"""Many requests in one call: the message that is sent, and a result for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex._map import MapItem, item_request
from loraplex._options import GenerateOptions
from loraplex._readers import generation
from loraplex._status import error_from_message
from loraplex._types import Generation
from loraplex.errors import InternalError, LoraplexError
from loraplex.v1 import generation_pb2


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of one prompt of a batch: an answer or an error."""

    position: int
    """Index of the prompt among those that were sent."""
    answer: Generation | None
    error: LoraplexError | None

    def unwrap(self) -> Generation:
        """The answer.

        Raises:
            LoraplexError: there is none.
        """
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer


def batch_request(
    prompts: Iterable[MapItem], options: GenerateOptions
) -> generation_pb2.GenerateBatchRequest:
    """The requests as sent; a prompt's own options win over those of all.

    Raises:
        InvalidRequestError: an argument is of the wrong type.
    """
    batch = generation_pb2.GenerateBatchRequest()
    for item in prompts:
        batch.requests.append(item_request(item, options))
    return batch


class BatchReader:
    """Reads the results of one batch, and knows whether all of them came."""

    request_id = ""

    def __init__(self, batch: generation_pb2.GenerateBatchRequest) -> None:
        self._requests = batch.requests
        self._left = set(range(len(batch.requests)))

    def read(self, response: generation_pb2.GenerateBatchResponse) -> BatchResult:
        self._left.discard(response.position)
        request = self._requests[response.position]
        if response.HasField("error"):
            error = error_from_message(response.error, request.request_id)
            return BatchResult(response.position, None, error)
        return BatchResult(response.position, generation(request, response.answer), None)

    def check_complete(self) -> None:
        """Called at the end of the stream."""
        if self._left:
            raise InternalError(f"the batch ended without {len(self._left)} of its results")


def in_order(results: Iterable[BatchResult]) -> list[Generation | LoraplexError]:
    """The answer to each prompt, or its error, in the order of the prompts."""
    found = sorted(results, key=lambda result: result.position)
    return [result.unwrap() if result.error is None else result.error for result in found]
