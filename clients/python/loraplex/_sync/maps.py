# Made from ../_async/maps.py by `make sync`: change that file.
"""Answers to many prompts, in the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from loraplex._config import Timeout
from loraplex._map import MapSource
from loraplex._readers import generation
from loraplex._sync.transport import PendingCall, Transport
from loraplex._sync.waiting import PendingAnswer, Workers
from loraplex._types import Generation
from loraplex.errors import LoraplexError
from loraplex.v1 import generation_pb2

AnswerT = TypeVar("AnswerT")


class PendingGeneration:
    """One answer of a map, received whole."""

    def __init__(
        self, transport: Transport, request: generation_pb2.GenerateRequest, timeout: Timeout | None
    ) -> None:
        self._request = request
        self._call = PendingCall(
            transport,
            "GenerationService/GenerateUnary",
            generation_pb2.GenerateUnaryRequest(request=request),
            timeout,
            request.request_id,
        )

    def collect(self) -> Generation:
        return generation(self._request, self._call.result())

    def close(self) -> None:
        self._call.close()


class GenerationMap(Generic[AnswerT]):
    """The answers of `map`, in the order of their prompts: iterate over it.

    Leaving it early cancels what still runs: by `with`, by `close()`, or by letting go of the last
    reference.
    """

    def __init__(
        self,
        source: MapSource,
        begin: Callable[[generation_pb2.GenerateRequest], PendingAnswer],
        return_errors: bool,
    ) -> None:
        self._source = source
        self._workers = Workers(begin, source.concurrency)
        self._return_errors = return_errors
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnswerT:
        try:
            while not self._ended and self._workers.pending < self._source.window:
                request = self._source.next()
                if request is None:
                    self._ended = True
                else:
                    self._workers.submit(request)
            if not self._workers.pending:
                raise StopIteration
            outcome = self._workers.take()
            self._source.tell(self._workers.finished)
            if isinstance(outcome, LoraplexError) and not self._return_errors:
                raise outcome
        except BaseException:
            self.close()
            raise
        # Where errors are raised, none arrives here.
        return cast("AnswerT", outcome)

    def collect(self) -> list[AnswerT]:
        """The answers that are left, as a list."""
        return list(self)

    def close(self) -> None:
        """Cancels what still runs and reads no more prompts. It waits for nothing but the cancellations."""
        self._ended = True
        self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed.
        if (workers := getattr(self, "_workers", None)) is not None:
            workers.let_go()
