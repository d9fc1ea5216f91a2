"""Messages as frames on a connection: a 4-byte big-endian length and that many bytes of msgpack."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from loraplex_server.wire.messages import FromEngine, ToEngine

_encoder = msgspec.msgpack.Encoder()

_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame, its length before it."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode_to_engine(body: bytes) -> ToEngine:
    """Raises: msgspec.DecodeError for anything that is no such message."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """Raises: msgspec.DecodeError for anything that is no such message."""
    return _from_engine.decode(body)


class FrameBuffer:
    """Cuts what comes from a connection into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the frames that are complete with `data`."""
        data = self._rest + data if self._rest else data
        begin = 0
        while len(data) - begin >= 4:
            end = begin + 4 + int.from_bytes(data[begin : begin + 4], "big")
            if end > len(data):
                break
            yield data[begin + 4 : end]
            begin = end
        self._rest = data[begin:]
