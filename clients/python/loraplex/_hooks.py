"""What a caller's own code is told of every call, for tracing and measuring."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.errors import LoraplexError


@dataclass(slots=True)
class CallInfo:
    """One call, from `on_request` to `on_response` the same object."""

    method: str
    """Full name, such as `loraplex.v1.GenerationService/Generate`."""
    request_id: str
    """As the caller chose it; once an answer has begun, as the server names it. Empty while nobody has."""
    metadata: dict[str, str]
    """What goes with the call; `on_request` may add to it. Keys in lower case."""
    seconds: float = 0.0
    """How long it took, up to `on_response`."""


class CallHook:
    """Derive from it, override what is wanted, and give clients one: `Client(hooks=[Tracing()])`.

    Both kinds of client call both methods plainly: on the thread or in the task that makes the call, and
    where a stream is let go of, on the one that does so. What they raise ends the call.

    >>> class Tracing(CallHook):
    ...     def on_request(self, call):
    ...         call.metadata["traceparent"] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ...     def on_response(self, call, error):
    ...         print(call.method, error or "succeeded")
    >>> with Client("127.0.0.1:50051", hooks=[Tracing()]) as traced:
    ...     answer = traced.generate("Hello", max_tokens=1)
    loraplex.v1.GenerationService/GenerateUnary succeeded
    """

    def on_request(self, call: CallInfo) -> None:
        """Called before anything is sent; retries of gRPC's own belong to the same call."""

    def on_response(self, call: CallInfo, error: LoraplexError | None) -> None:
        """Called once, at the end: of a stream when its last chunk was read, or when it was closed.

        Args:
            error: what the caller gets; RequestCancelledError where it left early.
        """
