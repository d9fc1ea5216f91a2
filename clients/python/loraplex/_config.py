"""Settings of a client: timeouts, retries, keepalive, TLS. Each checks its values when it is made."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from loraplex.errors import InvalidRequestError

Pem = bytes | str | os.PathLike[str]
"""PEM text as bytes, or the path of a file that holds it."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each phase of a call may take, in seconds; None is no limit.

    Whichever passes first raises DeadlineExceededError, whose `phase` has the name of the field here. A plain
    number in the place of a Timeouts is `total`, with the client's other limits.

    >>> limits = Timeouts(connect=5, first_token=60, between_tokens=10)
    >>> with Client("127.0.0.1:50051", timeout=limits) as client:
    ...     print(client.generate("Hello", max_tokens=1).usage.completion_tokens)
    1
    """

    connect: float | None = None
    """Waiting for a connection. The first call, and each after an UNAVAILABLE, asks for the server's health
    before anything else. None: such a call fails when no server is there, after the retries."""
    first_token: float | None = None
    """Waiting for the first part of an answer, queueing and prefill included."""
    between_tokens: float | None = None
    """Waiting for each further part. Time that the caller takes between two parts does not count."""
    total: float | None = None
    """The whole call, retries included. The server knows it, and refuses what cannot be finished in time."""

    def __post_init__(self) -> None:
        for name in ("connect", "first_token", "between_tokens", "total"):
            seconds = getattr(self, name)
            if seconds == math.inf:
                object.__setattr__(self, name, None)
            elif seconds is not None and not seconds > 0:
                raise InvalidRequestError.for_field(
                    "timeout" if name == "total" else f"timeout.{name}",
                    f"must be positive seconds, not {seconds}; float('inf') is no limit",
                )

    @property
    def of_parts(self) -> bool:
        """True if an answer must be read in parts to keep these limits."""
        return self.first_token is not None or self.between_tokens is not None


Timeout = float | Timeouts
"""Seconds for a whole call, or limits for its phases."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When gRPC repeats a call that failed with UNAVAILABLE.

    A generation is repeated only while the server has sent nothing of its answer. Loading and
    unloading are never repeated: the first attempt may have taken effect. A server whose queue is
    full is not asked again unless `when_full` says so; the error's `retry_after_s` tells when that
    makes sense.

    The server may ask for a pause before attempt n + 1. Otherwise the pause is random, up to
    min(initial_backoff_s * multiplier ** (n - 1), max_backoff_s).
    """

    max_attempts: int = 4
    """The first one included: 2 to 5 (gRPC's own limit)."""
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    multiplier: float = 2.0
    when_full: bool = False
    """Also repeat calls that failed with RESOURCE_EXHAUSTED, after the pause that the server asked for."""
    budget: int | None = 100
    """Each failed attempt takes 1 from it, each call that succeeds adds 0.2. While less than half is left,
    nothing is repeated, so that retries do not add to an overload. At most 1000; None: no budget. Clients of
    one process share the budget for a server."""

    def __post_init__(self) -> None:
        if not 2 <= self.max_attempts <= 5:
            raise InvalidRequestError.for_field(
                "retry.max_attempts", f"must be 2 to 5, not {self.max_attempts}; retry=None is one attempt"
            )
        for name in ("initial_backoff_s", "max_backoff_s", "multiplier"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InvalidRequestError.for_field(f"retry.{name}", f"must be positive, not {value}")
        if self.budget is not None and not 1 <= self.budget <= 1000:
            raise InvalidRequestError.for_field("retry.budget", f"must be 1 to 1000, not {self.budget}")


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
    """Certificates of the authorities to trust."""
    certificate: Pem | None = None
    """The client's certificate, for a server that asks for one; needs `key`."""
    key: Pem | None = None
    server_name: str | None = None
    """Name to expect in the server's certificate, where it is not the host of the address."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidRequestError.for_field("tls", "a client certificate needs both certificate and key")


def read_pem(pem: Pem | None, field: str) -> bytes | None:
    """The bytes of a certificate or key.

    Raises:
        InvalidRequestError: the file cannot be read, or its content is not PEM.
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
