"""One call from its start to its end: its limits, its metadata, its errors, and who is told of it."""

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
    """Makes the SDK's values of the messages of one call."""

    request_id: str
    """As the server's logs name the request; empty where it is not known, or there are several."""

    def read(self, message: Any) -> ItemT_co: ...

    def check_complete(self) -> None:
        """Called at the end: raises an InternalError if something is lacking."""


PROBE = "/grpc.health.v1.Health/Check"
"""Asked to find out whether anybody is there; every gRPC server has an answer, if only UNIMPLEMENTED."""


@dataclass(slots=True)
class Connection:
    """What a client knows of its connection: whether the last call got through to a server."""

    up: bool = False


class Call:
    """A `with` around whatever a call does, or awaits; it lets no error of gRPC's out.

    Several in turn belong to one call: each read of a stream is one. `finish` ends it well.

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
        """Seconds left altogether; None for no limit."""
        if self.limits.total is None:
            return None
        left = self._start + self.limits.total - time.monotonic()
        if left <= 0:
            raise self.late("total")
        return left

    @property
    def must_connect(self) -> bool:
        """Whether it is to be found out first, by `PROBE`, that there is a server."""
        return self.limits.connect is not None and not self._connection.up

    def probe_options(self) -> dict[str, Any]:
        """Keyword arguments of the probe."""
        assert self.limits.connect is not None
        left = self.remaining()
        self._probed_to_the_end = left is not None and left <= self.limits.connect
        return {"timeout": left if self._probed_to_the_end else self.limits.connect, "wait_for_ready": True}

    def probed(self, code: grpc.StatusCode, server: str) -> None:
        """Takes the outcome of the probe.

        Raises:
            DeadlineExceededError: nobody answered.
        """
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            assert self.limits.connect is not None
            if self._probed_to_the_end:
                raise self.late("total")
            text = f"no connection to {server} within {self.limits.connect:g} s"
            raise DeadlineExceededError.in_phase("connect", text, request_id=self.info.request_id)
        self._connection.up = True

    def wait_phase(self, first: bool) -> tuple[TimeoutPhase, float | None]:
        """The phase that a wait for a part of an answer belongs to, and how many seconds it may take."""
        if first:
            return "first_token", self.limits.first_token
        return "between_tokens", self.limits.between_tokens

    def expire(self, phase: TimeoutPhase) -> None:
        """Makes the cancellation that follows the end of this phase's time."""
        self._expired = phase

    def late(self, phase: TimeoutPhase) -> DeadlineExceededError:
        """The error where a phase took too long."""
        seconds = getattr(self.limits, phase)
        return DeadlineExceededError.in_phase(
            phase, f"{_WAITED_FOR[phase]} within {seconds:g} s", request_id=self.info.request_id
        )

    def finish(self, error: LoraplexError | None = None) -> None:
        """Tells the hooks, the first time."""
        if self._finished:
            return
        self._finished = True
        self.info.seconds = time.monotonic() - self._start
        for hook in self._hooks:
            hook.on_response(self.info, error)

    def leave(self) -> None:
        """Ends it as one that its caller did not want to the end, unless it has ended."""
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
        """The SDK's error for one that came out of gRPC; None for what is not the call's."""
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
