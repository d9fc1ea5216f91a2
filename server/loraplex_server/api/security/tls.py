"""TLS of the gRPC and HTTP ports, from PEM files that may be renewed while the server runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from loraplex_server.api.security.reloaded import Reloaded
from loraplex_server.config import TlsFiles
from loraplex_server.core.errors import FailedPreconditionError


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


def http_context(files: TlsFiles) -> ssl.SSLContext:
    """The same for HTTP: each handshake takes the files as they are then.

    Raises:
        FailedPreconditionError: as `server_credentials`.
    """
    paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
    try:
        found = Reloaded(paths, lambda: _context(files))
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(f"TLS cannot be set up: {error}") from error

    def renew(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        connection.context = found.get()

    listening = _context(files)
    # Called in every handshake, whether or not the client names a host.
    listening.sni_callback = renew
    return listening


def _context(files: TlsFiles) -> ssl.SSLContext:
    _pem(files.certificate, b"CERTIFICATE")
    _pem(files.key, b"PRIVATE KEY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, files)
    if files.client_ca is not None:
        _pem(files.client_ca, b"CERTIFICATE")
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise ValueError(f"{files.client_ca} holds no certificate of an authority: {error}") from error
    return context


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
    _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)


def _load_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    try:
        # A key under a password would have Python ask for it on the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"{files.certificate} and {files.key} are no certificate with its key (without password): {error}"
        ) from error
