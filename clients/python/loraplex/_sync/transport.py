# Made from ../_async/transport.py by `make sync`: change that file.
"""The channel of a client, and the calls with one answer that are made on it."""

from __future__ import annotations

from typing import Any

import grpc

from loraplex._calls import PROBE, Call
from loraplex._config import Timeout
from loraplex._sync.waiting import Channel, result, start
from loraplex._transport import BaseTransport, CallSettings


class Transport(BaseTransport):
    """Owns the channel: connects, and makes calls."""

    def __init__(self, settings: CallSettings) -> None:
        super().__init__(settings)
        self._channel = Channel(settings.channel, list(settings.interceptors))

    def stub(self, method: str) -> Any:
        """The callable of a method, such as `GenerationService/Generate`.

        Raises:
            RuntimeError: the client is closed.
        """
        self.check_open()
        return self._channel.stub(method)

    def call(
        self, method: str, request: Any, timeout: Timeout | None, *, request_id: str = "", **how: Any
    ) -> Any:
        """The answer to one request.

        Args:
            how: further keyword arguments of the gRPC call.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        call = self.begin(method, timeout, request_id)
        with call:
            self.connect(call)
            response = self.stub(method)(request, **call.options(), **how)
        call.finish()
        return response

    def connect(self, call: Call) -> None:
        """Waits until a server answers, if the call has a limit for that."""
        if call.must_connect:
            self.check_open()
            code = grpc.StatusCode.OK
            try:
                self._channel.raw_stub(PROBE)(b"", **call.probe_options())
            except grpc.RpcError as error:
                code = error.code()
            call.probed(code, self._settings.channel.target)

    def close(self) -> None:
        """Cancels what is running and closes the connection."""
        self._closed = True
        self._channel.close()


class PendingCall:
    """A call with one answer that may be cancelled while somebody waits for it."""

    def __init__(
        self, transport: Transport, method: str, request: Any, timeout: Timeout | None, request_id: str
    ) -> None:
        self._transport = transport
        self._request = request
        self._call = transport.begin(method, timeout, request_id)
        self._grpc: Any = None
        self._closed = False

    def result(self) -> Any:
        """The answer.

        Raises:
            LoraplexError: see loraplex.errors.
        """
        with self._call:
            self._transport.connect(self._call)
            stub = self._transport.stub(self._call.method)
            self._grpc = start(stub, self._request, self._call.options())
            if self._closed:
                self._grpc.cancel()
            response = result(self._grpc)
        self._call.finish()
        return response

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._closed = True
        if self._grpc is not None:
            self._grpc.cancel()
