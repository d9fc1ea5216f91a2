"""The tenant of a call: by a bearer token, else by the client's certificate, else one for all."""

from __future__ import annotations

import contextvars
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from loraplex_server.api.security.reloaded import Reloaded
from loraplex_server.core.errors import FailedPreconditionError, UnauthenticatedError

ANYONE = "default"
"""The tenant of every call where clients need not authenticate."""

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default=ANYONE)
"""The tenant of this call; part of every key of the KV cache, so nothing is shared between tenants."""

_TENANT = re.compile(r"[A-Za-z0-9._@*-]{1,128}")
_LINE = re.compile(r"(\S+)\s+sha256:([0-9a-f]{64})")
_MAX_FILE_BYTES = 1 << 20


class Authenticator:
    """Names the tenant of a call.

    The token file has a line for each token: the tenant's name, then `sha256:` and the SHA-256 of the token
    in hex; `loraplex token NAME` makes both. Empty lines and lines that begin with # are skipped; a name may
    come more than once, so that a token can be renewed. The file is read again when it changes.

    Args:
        token_file: None asks for no token.
        certificates: clients have shown a certificate, which names them where no token does.

    Raises:
        FailedPreconditionError: the file cannot be read, or has a line that is none of these.
    """

    def __init__(self, token_file: Path | None, *, certificates: bool = False) -> None:
        self._certificates = certificates
        self._tokens: Reloaded[tuple[tuple[bytes, str], ...]] | None = None
        if token_file is not None:
            try:
                self._tokens = Reloaded([token_file], lambda: _read(token_file))
            except (OSError, ValueError) as error:
                raise FailedPreconditionError(f"the token file cannot be used: {error}") from error

    def tenant_of(self, authorization: str | None, names: Callable[[], Iterable[str]]) -> str:
        """The tenant whose call it is.

        Args:
            authorization: the call's header or metadata of that name, `Bearer TOKEN`.
            names: those in the certificate that the connection has shown, the common name first.

        Raises:
            UnauthenticatedError: no token, an unknown one, or a certificate without a usable name.
        """
        if self._tokens is not None:
            return self._by_token(authorization)
        if self._certificates:
            return _by_certificate(names())
        return ANYONE

    def _by_token(self, authorization: str | None) -> str:
        assert self._tokens is not None
        if authorization is None:
            raise UnauthenticatedError("no token; send `authorization: Bearer TOKEN`")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError("the authorization is no bearer token; send `Bearer TOKEN`")
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        # All are compared, each in constant time: how long it takes says nothing about which one it was.
        for known, name in self._tokens.get():
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise UnauthenticatedError("the token is not one of this server's")
        return found


def _by_certificate(names: Iterable[str]) -> str:
    for name in names:
        if _TENANT.fullmatch(name):
            return name
    raise UnauthenticatedError("the client certificate has no common or alternative name that can be used")


def _read(path: Path) -> tuple[tuple[bytes, str], ...]:
    with path.open("rb") as file:
        text = file.read(_MAX_FILE_BYTES + 1)
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {_MAX_FILE_BYTES} bytes")
    found = []
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        # The text does not show the line: it may be a token that was not hashed.
        if match is None or _TENANT.fullmatch(match[1]) is None:
            raise ValueError(f"{path}, line {number} is not `NAME sha256:HEX`; see loraplex token --help")
        found.append((bytes.fromhex(match[2]), match[1]))
    if not found:
        raise ValueError(f"{path} has no token; make one with loraplex token NAME")
    return tuple(found)
