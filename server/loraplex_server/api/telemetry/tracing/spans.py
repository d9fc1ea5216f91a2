"""Spans of calls and generations. Without a collector there are none, which costs next to nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from loraplex_server.core.request import Request
from loraplex_server.wire.messages import Times


@dataclasses.dataclass(frozen=True)
class Generated:
    """The outcome of a generation, for its span.

    Attributes:
        outcome: "stop", "length", or why it ended otherwise, in lower case.
        completion_tokens: returned to the client.
        times: the engine's last; None where it sent none.
        first_token_s: seconds from the arrival to the first token; None where there was none.
    """

    outcome: str
    completion_tokens: int
    times: Times | None
    first_token_s: float | None


class CallSpan(Protocol):
    """A call from its arrival on."""

    def end_rpc(self, code: str) -> None:
        """The call ended with the gRPC status `code`."""

    def end_http(self, route: str | None, status: int) -> None:
        """The request was answered with `status`; `route` is None for a path that is not served."""


class GenerationSpan(Protocol):
    """A generation from its arrival on."""

    def end(self, generated: Generated) -> None: ...


class Tracing(Protocol):
    """Makes the spans of calls and generations. Nothing here waits or raises."""

    def rpc(self, method: str, metadata: Mapping[str, str]) -> CallSpan:
        """A gRPC call begins; generations of this task and its children are part of it.

        Args:
            method: as gRPC has it: /package.Service/Method.
            metadata: `traceparent` and `tracestate` say which trace it continues.
        """

    def http(self, method: str, path: str, headers: Mapping[str, str]) -> CallSpan:
        """The same of an HTTP request."""

    def generation(self, request: Request, *, chat: bool, request_id: str, seconds: float) -> GenerationSpan:
        """A request goes to the engine, `seconds` after it arrived; `request_id` is the client's."""

    async def close(self) -> None:
        """Sends what is left, for a few seconds at most."""


class _NoSpan:
    def end_rpc(self, code: str) -> None:
        pass

    def end_http(self, route: str | None, status: int) -> None:
        pass

    def end(self, generated: Generated) -> None:
        pass


NO_SPAN = _NoSpan()


class NoTracing:
    """Tracing that makes no spans."""

    def rpc(self, method: str, metadata: Mapping[str, str]) -> CallSpan:
        return NO_SPAN

    def http(self, method: str, path: str, headers: Mapping[str, str]) -> CallSpan:
        return NO_SPAN

    def generation(self, request: Request, *, chat: bool, request_id: str, seconds: float) -> GenerationSpan:
        return NO_SPAN

    async def close(self) -> None:
        pass
