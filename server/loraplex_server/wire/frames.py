"""Encodes messages as frames: a 4-byte big-endian length, then that many bytes of msgpack."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from loraplex_server.wire.messages import FromEngine, ToEngine

_encoder = msgspec.msgpack.Encoder()

_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame: the length of the message, then the message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode_to_engine(body: bytes) -> ToEngine:
    """The message in the body of a frame that a client sent.

    Raises:
        msgspec.DecodeError: `body` is not such a message.
    """
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """The message in the body of a frame that the engine sent.

    Raises:
        msgspec.DecodeError: `body` is not such a message.
    """
    return _from_engine.decode(body)


class FrameBuffer:
    """Splits the bytes of a connection into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Takes in `data` and yields the bodies of the frames that it completes."""
        data = self._rest + data if self._rest else data
        begin = 0
        while len(data) - begin >= 4:
            end = begin + 4 + int.from_bytes(data[begin : begin + 4], "big")
            if end > len(data):
                break
            yield data[begin + 4 : end]
            begin = end
        self._rest = data[begin:]
