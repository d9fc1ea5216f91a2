"""The base of both transports: stubs, and the limits, metadata and hooks of every call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex._calls import Call, Connection
from loraplex._channel import ChannelSettings
from loraplex._config import Timeout, Timeouts
from loraplex._hooks import CallHook
from loraplex.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc


@dataclass(frozen=True, slots=True)
class Stubs:
    """The generated stubs on one channel, synchronous or not as the channel is (hence untyped)."""

    generation: Any
    adapters: Any
    model: Any

    def method(self, name: str) -> Any:
        """The callable of a method, such as `GenerationService/Generate`."""
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


@dataclass(frozen=True, slots=True)
class CallSettings:
    """A client's settings for all of its calls."""

    channel: ChannelSettings
    limits: Timeouts
    metadata: Mapping[str, str]
    hooks: Sequence[CallHook]
    interceptors: Sequence[Any]
    """gRPC's own, of `grpc` or `grpc.aio`."""
    owner: str
    """The client, as errors name it."""


class BaseTransport:
    """Begins calls; its two subclasses make them on a channel."""

    def __init__(self, settings: CallSettings) -> None:
        self._settings = settings
        self._connection = Connection()
        self._closed = False

    def limits_of(self, timeout: Timeout | None) -> Timeouts:
        """The limits of a call: None is the client's, a number is `total`."""
        if timeout is None:
            return self._settings.limits
        if isinstance(timeout, Timeouts):
            return timeout
        return dataclasses.replace(self._settings.limits, total=timeout)

    def begin(self, method: str, timeout: Timeout | None, request_id: str = "") -> Call:
        """A call that begins now.

        Raises:
            RuntimeError: the client is closed.
        """
        self.check_open()
        settings = self._settings
        limits = self.limits_of(timeout)
        return Call(method, limits, settings.metadata, settings.hooks, self._connection, request_id)

    def check_open(self) -> None:
        """Does nothing on an open client.

        Raises:
            RuntimeError: the client is closed.
        """
        if self._closed:
            raise RuntimeError(f"{self._settings.owner} is closed; make a new one")
