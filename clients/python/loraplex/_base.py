"""What the two clients share: everything but the waiting."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex._calls import Call, Connection
from loraplex._channel import ChannelSettings, authorization, channel_settings
from loraplex._config import Keepalive, RetryPolicy, Timeout, Timeouts, TlsConfig
from loraplex._hooks import CallHook
from loraplex.errors import DeadlineExceededError
from loraplex.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc

DEFAULT_SERVER = "127.0.0.1:50051"


@dataclass(frozen=True, slots=True)
class Stubs:
    """The generated stubs on one channel, synchronous or not as the channel is (hence untyped)."""

    generation: Any
    adapters: Any
    model: Any

    def method(self, name: str) -> Any:
        """What calls a method, such as `GenerationService/Generate`."""
        service, _, method = name.partition("/")
        stub = {
            "GenerationService": self.generation,
            "AdapterService": self.adapters,
            "ModelService": self.model,
        }[service]
        return getattr(stub, method)


def stubs_on(channel: Any) -> Stubs:
    return Stubs(
        generation=generation_pb2_grpc.GenerationServiceStub(channel),  # type: ignore[no-untyped-call]
        adapters=adapters_pb2_grpc.AdapterServiceStub(channel),  # type: ignore[no-untyped-call]
        model=model_pb2_grpc.ModelServiceStub(channel),  # type: ignore[no-untyped-call]
    )


class BaseClient:
    """Settings and state of a client, whichever way it waits."""

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
        self._settings: ChannelSettings = channel_settings(
            server, tls=tls, retry=retry, keepalive=keepalive, options=dict(channel_options or {})
        )
        self._limits = timeout if isinstance(timeout, Timeouts) else Timeouts(total=timeout)
        self._hooks = tuple(hooks)
        self._interceptors = tuple(interceptors)
        headers = {key.lower(): value for key, value in (metadata or {}).items()}
        bearer = authorization(token, self._settings, allow_insecure_token)
        if bearer is not None:
            headers["authorization"] = bearer
        self._metadata = headers
        self._connection = Connection()
        self._closed = False
        self._open()

    def _open(self) -> None:
        """Makes what the constructor can already make."""

    @property
    def server(self) -> str:
        """The address that calls go to."""
        return self._settings.target

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.server!r})"

    def _limits_of(self, timeout: Timeout | None) -> Timeouts:
        """The limits of a call; None is the client's, a number is `total`."""
        if timeout is None:
            return self._limits
        if isinstance(timeout, Timeouts):
            return timeout
        return dataclasses.replace(self._limits, total=timeout)

    def _begin(self, method: str, timeout: Timeout | None, request_id: str = "") -> Call:
        """A call that begins now."""
        self._check_open()
        limits = self._limits_of(timeout)
        return Call(method, limits, self._metadata, self._hooks, self._connection, request_id)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self!r} is closed; make a new one")


class Wait:
    """The time left of `wait_until_ready`, which asks again while a server is starting."""

    POLL_S = 0.1

    def __init__(self, server: str, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        self._end = time.monotonic() + timeout

    def remaining(self) -> float:
        """Seconds left.

        Raises:
            DeadlineExceededError: none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.expired()
        return left

    def expired(self) -> DeadlineExceededError:
        return DeadlineExceededError.in_phase(
            "connect", f"no server was ready at {self._server} within {self._timeout:g} s"
        )
