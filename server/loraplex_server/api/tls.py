"""TLS of the gRPC port, from PEM files that may be renewed while the server runs."""

from __future__ import annotations

from pathlib import Path

import grpc

from loraplex_server.api.reloaded import Reloaded
from loraplex_server.config import TlsFiles
from loraplex_server.errors import FailedPreconditionError


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that each new connection takes from the files as they are then.

    With `files.client_ca` a connection needs a certificate that one of those authorities has signed.

    Raises:
        FailedPreconditionError: a file cannot be read or is no PEM, or certificate and key do not match.
    """
    paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
    try:
        found = Reloaded(paths, lambda: _read(files))
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(f"TLS cannot be set up: {error}") from error
    return grpc.dynamic_ssl_server_credentials(
        found.get(), found.get, require_client_authentication=files.client_ca is not None
    )


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    certificate, key = _pem(files.certificate, b"CERTIFICATE"), _pem(files.key, b"PRIVATE KEY")
    _check_pair(files)
    authorities = _pem(files.client_ca, b"CERTIFICATE") if files.client_ca else None
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authorities)


def _pem(path: Path, kind: bytes) -> bytes:
    text = path.read_bytes()
    if b"-----BEGIN" not in text or kind + b"-----" not in text:
        raise ValueError(f"{path} holds no PEM {kind.decode().lower()}")
    return text


def _check_pair(files: TlsFiles) -> None:
    """gRPC itself would take a pair that does not match, and then refuse every connection without a word."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            # A key under a password would have Python ask for it on the terminal.
            files.certificate,
            files.key,
            password="",
        )
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"{files.certificate} and {files.key} are no certificate with its key (without password): {error}"
        ) from error
