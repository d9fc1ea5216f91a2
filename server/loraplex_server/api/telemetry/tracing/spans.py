"""What is traced, for whoever traces it. Without a collector nobody does, and it costs next to nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from loraplex_server.core.request import Request
from loraplex_server.wire.messages import Times


@dataclasses.dataclass(frozen=True)
class Generated:
    """How a generation went.

    Attributes:
        outcome: "stop", "length", or why it ended otherwise, in lower case.
        completion_tokens: returned to the caller.
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
        """It ended with the gRPC status `code`."""

    def end_http(self, route: str | None, status: int) -> None:
        """It was answered with `status`; None is a path that is not served."""


class GenerationSpan(Protocol):
    """A generation from its arrival on."""

    def end(self, generated: Generated) -> None: ...


class Tracing(Protocol):
    """Takes calls and generations in. Nothing of it waits or raises."""

    def rpc(self, method: str, metadata: Mapping[str, str]) -> CallSpan:
        """A gRPC call begins; generations of this task and its children are part of it.

        Args:
            method: as gRPC has it: /package.Service/Method.
            metadata: `traceparent` and `tracestate` say which trace it continues.
        """

    def http(self, method: str, path: str, headers: Mapping[str, str]) -> CallSpan:
        """The same of an HTTP request."""

    def generation(self, request: Request, *, chat: bool, request_id: str, seconds: float) -> GenerationSpan:
        """A request goes to the engine, `seconds` after it arrived; `request_id` is the caller's."""

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
    """Nobody wants to know."""

    def rpc(self, method: str, metadata: Mapping[str, str]) -> CallSpan:
        return NO_SPAN

    def http(self, method: str, path: str, headers: Mapping[str, str]) -> CallSpan:
        return NO_SPAN

    def generation(self, request: Request, *, chat: bool, request_id: str, seconds: float) -> GenerationSpan:
        return NO_SPAN

    async def close(self) -> None:
        pass
