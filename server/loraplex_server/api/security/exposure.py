"""Warnings of a port that others can reach."""

from __future__ import annotations

import logging

from loraplex_server.config import ApiConfig, is_loopback

_log = logging.getLogger(__name__)


def asks_for_certificates(api: ApiConfig) -> bool:
    """True where clients have to show a certificate."""
    return api.tls is not None and api.tls.client_ca is not None


def warn_of_exposure(api: ApiConfig) -> None:
    """Warns of calls that are not encrypted, and of those that anyone may make, beyond this machine."""
    if is_loopback(api.host):
        return
    if api.tls is None:
        _log.warning("%s is no loopback address, and calls are not encrypted", api.host)
    if api.token_file is None and not asks_for_certificates(api):
        _log.warning("%s is no loopback address, and anyone who reaches it may call", api.host)
