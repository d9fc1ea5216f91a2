"""One call from its start to its end: limits, metadata, errors, hooks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

import grpc

from loraplex._config import Timeouts
from loraplex._hooks import CallHook, CallInfo
from loraplex._status import error_from_call
from loraplex.errors import (
    DeadlineExceededError,
    LoraplexError,
    RequestCancelledError,
    TimeoutPhase,
    UnavailableError,
)

PACKAGE = "loraplex.v1."

_WAITED_FOR: dict[TimeoutPhase, str] = {
    "first_token": "nothing of the answer came",
    "between_tokens": "the answer did not go on",
    "total": "the call was not complete",
}


ItemT_co = TypeVar("ItemT_co", covariant=True)


class Reader(Protocol[ItemT_co]):
    """Turns the messages of one call into the SDK's values."""

    request_id: str
    """The request's name in the server's logs; empty while unknown, or where there are several requests."""

    def read(self, message: Any) -> ItemT_co: ...

    def check_complete(self) -> None:
        """Called at the end of the stream.

        Raises:
            InternalError: something is missing.
        """


PROBE = "/grpc.health.v1.Health/Check"
"""Called to find out whether a server is there: every gRPC server answers it, if only UNIMPLEMENTED."""


@dataclass(slots=True)
class Connection:
    """A client's knowledge of its connection: whether the last call reached a server."""

    up: bool = False


class Call:
    """A context manager around each step of a call; it turns gRPC's errors into the SDK's.

    A call may enter it several times: each read of a stream does. `finish` ends the call.

    Args:
        method: such as `GenerationService/Generate`.
    """

    def __init__(
        self,
        method: str,
        limits: Timeouts,
        metadata: Mapping[str, str],
        hooks: Sequence[CallHook],
        connection: Connection,
        request_id: str = "",
    ) -> None:
        self.method = method
        self.limits = limits
        self.info = CallInfo(PACKAGE + method, request_id, dict(metadata))
        self._hooks = hooks
        self._connection = connection
        self._expired: TimeoutPhase | None = None
        self._finished = False
        self._probed_to_the_end = False
        self._start = time.monotonic()
        for hook in hooks:
            hook.on_request(self.info)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the gRPC call that is made now.

        Raises:
            DeadlineExceededError: no time is left.
        """
        return {"timeout": self.remaining(), "metadata": tuple(self.info.metadata.items())}

    def remaining(self) -> float | None:
        """Seconds left for the whole call; None for no limit.

        Raises:
            DeadlineExceededError: no time is left.
        """
        if self.limits.total is None:
            return None
        left = self._start + self.limits.total - time.monotonic()
        if left <= 0:
            raise self.late("total")
        return left

    @property
    def must_connect(self) -> bool:
        """Whether `PROBE` must first find out that there is a server."""
        return self.limits.connect is not None and not self._connection.up

    def probe_options(self) -> dict[str, Any]:
        """Keyword arguments of the probe."""
        assert self.limits.connect is not None
        left = self.remaining()
        self._probed_to_the_end = left is not None and left <= self.limits.connect
        return {"timeout": left if self._probed_to_the_end else self.limits.connect, "wait_for_ready": True}

    def probed(self, code: grpc.StatusCode, server: str) -> None:
        """Notes the outcome of the probe.

        Raises:
            DeadlineExceededError: no server answered.
        """
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            assert self.limits.connect is not None
            if self._probed_to_the_end:
                raise self.late("total")
            text = f"no connection to {server} within {self.limits.connect:g} s"
            raise DeadlineExceededError.in_phase("connect", text, request_id=self.info.request_id)
        self._connection.up = True

    def wait_phase(self, first: bool) -> tuple[TimeoutPhase, float | None]:
        """The phase that a wait for a part of an answer belongs to, and its limit in seconds."""
        if first:
            return "first_token", self.limits.first_token
        return "between_tokens", self.limits.between_tokens

    def expire(self, phase: TimeoutPhase) -> None:
        """Notes that the cancellation that follows is due to this phase's limit."""
        self._expired = phase

    def late(self, phase: TimeoutPhase) -> DeadlineExceededError:
        """The error where a phase took too long."""
        seconds = getattr(self.limits, phase)
        return DeadlineExceededError.in_phase(
            phase, f"{_WAITED_FOR[phase]} within {seconds:g} s", request_id=self.info.request_id
        )

    def finish(self, error: LoraplexError | None = None) -> None:
        """Tells the hooks that the call has ended, the first time that it is called."""
        if self._finished:
            return
        self._finished = True
        self.info.seconds = time.monotonic() - self._start
        for hook in self._hooks:
            hook.on_response(self.info, error)

    def leave(self) -> None:
        """Ends a call that its caller left early, unless it has ended."""
        self.finish(self._cancelled())

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        failure = self._failure(error)
        if isinstance(failure, UnavailableError):
            self._connection.up = False
        self.finish(failure or self._cancelled())
        if failure is not None and failure is not error:
            raise failure from error

    def _failure(self, error: BaseException) -> LoraplexError | None:
        """The SDK's error for an error of gRPC; None for one that has another origin."""
        if isinstance(error, LoraplexError):
            return error
        if self._expired is not None and isinstance(
            error, (grpc.RpcError, grpc.FutureCancelledError, asyncio.CancelledError)
        ):
            return self.late(self._expired)
        if isinstance(error, grpc.RpcError):
            return error_from_call(error, self.info.request_id)
        if isinstance(error, grpc.FutureCancelledError):
            return self._cancelled()
        # grpc.aio answers with asyncio's CancelledError when a call was cancelled beside the task
        # that awaits it. That task was not cancelled itself, and must not look as if it had been.
        if isinstance(error, asyncio.CancelledError) and not _task_is_cancelled():
            return self._cancelled()
        return None

    def _cancelled(self) -> RequestCancelledError:
        return RequestCancelledError("the call was cancelled on this side", request_id=self.info.request_id)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
