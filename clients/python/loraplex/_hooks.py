"""Hooks: a caller's own code that is told of every call, for tracing and measuring."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.errors import LoraplexError


@dataclass(slots=True)
class CallInfo:
    """One call. `on_request` and `on_response` get the same object."""

    method: str
    """Full name, such as `loraplex.v1.GenerationService/Generate`."""
    request_id: str
    """The caller's name for the request, or empty; once an answer has begun, the server's name for it."""
    metadata: dict[str, str]
    """Sent with the call; `on_request` may add to it. Keys in lower case."""
    seconds: float = 0.0
    """Duration up to `on_response`."""


class CallHook:
    """Base of hooks: override a method and pass an instance to a client, `Client(hooks=[Tracing()])`.

    Both clients call both methods synchronously, on the thread or in the task that makes the call; where a
    stream is dropped early, on the thread that drops it. An exception from a hook ends the call.

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
        """Called before anything is sent. Retries by gRPC belong to the same call."""

    def on_response(self, call: CallInfo, error: LoraplexError | None) -> None:
        """Called once, at the end. A stream ends when its last chunk was read, or when it was closed.

        Args:
            error: the error that the caller gets; RequestCancelledError where it left early.
        """
