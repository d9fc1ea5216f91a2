"""How a client reaches its server: values that are checked when they are made."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from loraplex.errors import InvalidRequestError

Pem = bytes | str | os.PathLike[str]
"""PEM text as bytes, or the path of a file that holds it."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When gRPC itself repeats a call that failed with UNAVAILABLE.

    A generation is repeated only while the server has sent nothing of its answer. Loading and
    unloading are never repeated: the first attempt may have taken effect. A server whose queue is
    full is not asked again either: the error's `retry_after_s` says when that makes sense.

    The pause before attempt n + 1 is random, up to min(initial_backoff_s * multiplier ** (n - 1),
    max_backoff_s).
    """

    max_attempts: int = 4
    """The first one included: 2 to 5 (gRPC's own limit)."""
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if not 2 <= self.max_attempts <= 5:
            raise InvalidRequestError.for_field(
                "retry.max_attempts", f"must be 2 to 5, not {self.max_attempts}; retry=None is one attempt"
            )
        for name in ("initial_backoff_s", "max_backoff_s", "multiplier"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InvalidRequestError.for_field(f"retry.{name}", f"must be positive, not {value}")


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Pings that find a dead connection while a call waits on it.

    A server ends connections that ping more often than it allows; loraplex servers allow these defaults.
    """

    interval_s: float = 60.0
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("interval_s", "timeout_s"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InvalidRequestError.for_field(f"keepalive.{name}", f"must be positive, not {value}")


@dataclass(frozen=True, slots=True, repr=False)
class TlsConfig:
    """TLS by certificates of one's own; `tls=True` alone trusts the authorities that gRPC ships with."""

    ca: Pem | None = None
    """Authorities that may have signed the server's certificate."""
    certificate: Pem | None = None
    """This client's own, where the server asks for one; goes with `key`."""
    key: Pem | None = None
    server_name: str | None = None
    """Name to expect in the server's certificate, where it is not the host of the address."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidRequestError.for_field("tls", "a client certificate needs both certificate and key")


def read_pem(pem: Pem | None, field: str) -> bytes | None:
    """The bytes of a certificate or key.

    Raises:
        InvalidRequestError: the file cannot be read, or what it holds is no PEM.
    """
    if pem is None:
        return None
    if isinstance(pem, bytes):
        data = pem
    else:
        try:
            with open(pem, "rb") as file:
                data = file.read()
        except OSError as error:
            raise InvalidRequestError.for_field(
                field, f"cannot read {os.fspath(pem)!r}: {error.strerror}"
            ) from error
    if b"-----BEGIN" not in data:
        raise InvalidRequestError.for_field(
            field, "holds no PEM; give PEM text as bytes, or the path of a file"
        )
    return data
