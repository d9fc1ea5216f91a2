"""The base of both clients: their settings, and the wait for a server that is starting."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex._channel import authorization, channel_settings
from loraplex._config import Keepalive, RetryPolicy, Timeout, Timeouts, TlsConfig
from loraplex._hooks import CallHook
from loraplex._transport import CallSettings
from loraplex.errors import DeadlineExceededError

DEFAULT_SERVER = "127.0.0.1:50051"


class BaseClient(abc.ABC):
    """The constructor and the address of a client, whichever way it waits."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        token: str | None = None,
        tls: bool | TlsConfig = False,
        timeout: Timeout | None = None,
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 (frozen)
        keepalive: Keepalive | None = Keepalive(),  # noqa: B008 (frozen)
        metadata: Mapping[str, str] | None = None,
        allow_insecure_token: bool = False,
        channel_options: Mapping[str, Any] | None = None,
        hooks: Sequence[CallHook] = (),
        interceptors: Sequence[Any] = (),
    ) -> None:
        """Nothing is sent before the first call.

        Args:
            server: HOST:PORT, or any gRPC target (`unix:/run/loraplex.sock`, `dns:///name:port`).
            token: bearer token, sent with every call. Over plain text it is only sent to this machine.
            tls: True, or a TlsConfig for certificates of one's own.
            timeout: seconds that a call may take altogether, its retries included, where the call does
                not say otherwise; or a Timeouts, which has limits for its phases. None: no limit.
            retry: what to do when the server is unavailable; None gives up at once.
            keepalive: pings that find dead connections; None sends none.
            metadata: further gRPC metadata for every call.
            allow_insecure_token: send the token over plain text to other machines too.
            channel_options: gRPC channel arguments, by name; they win over the client's own.
            hooks: told of every call, in this order; they may add metadata to it, such as `traceparent`.
            interceptors: gRPC's own client interceptors, of `grpc` for Client and of `grpc.aio` for
                AsyncClient.

        Raises:
            InvalidRequestError: a setting is wrong; the text names it.
        """
        channel = channel_settings(
            server, tls=tls, retry=retry, keepalive=keepalive, options=dict(channel_options or {})
        )
        headers = {key.lower(): value for key, value in (metadata or {}).items()}
        bearer = authorization(token, channel, allow_insecure_token)
        if bearer is not None:
            headers["authorization"] = bearer
        self._server = channel.target
        self._open(
            CallSettings(
                channel=channel,
                limits=timeout if isinstance(timeout, Timeouts) else Timeouts(total=timeout),
                metadata=headers,
                hooks=tuple(hooks),
                interceptors=tuple(interceptors),
                owner=repr(self),
            )
        )

    @abc.abstractmethod
    def _open(self, settings: CallSettings) -> None:
        """Makes the transport."""

    @property
    def server(self) -> str:
        """The address that calls go to."""
        return self._server

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.server!r})"


class Wait:
    """The time left of `wait_until_ready`, which asks again while a server is starting."""

    POLL_S = 0.1
    """Pause between two questions: short beside the seconds that a model takes to load."""

    def __init__(self, server: str, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        self._end = time.monotonic() + timeout

    def remaining(self) -> float:
        """Seconds left.

        Raises:
            DeadlineExceededError: no time is left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.expired()
        return left

    def expired(self) -> DeadlineExceededError:
        """The error of a server that was not ready in time."""
        return DeadlineExceededError.in_phase(
            "connect", f"no server was ready at {self._server} within {self._timeout:g} s"
        )
