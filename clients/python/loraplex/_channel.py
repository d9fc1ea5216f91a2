"""Settings of a gRPC channel: address, options, credentials and service config."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Any

import grpc

from loraplex._config import Keepalive, RetryPolicy, TlsConfig, read_pem
from loraplex._version import __version__
from loraplex.errors import InvalidRequestError

MAX_MESSAGE_BYTES = 64 << 20
"""Room for a million token ids, or the log-probabilities of a long answer; gRPC's own limit is 4 MiB."""

# Methods that gRPC may repeat. For the others, a second attempt could fail on the effect of the first.
REPEATABLE = {
    "loraplex.v1.GenerationService": (
        "Generate",
        "GenerateUnary",
        "GenerateBatch",
        "Tokenize",
        "CountTokens",
    ),
    "loraplex.v1.AdapterService": ("ListAdapters", "GetAdapter", "PinAdapter", "Prefetch", "Watch"),
    "loraplex.v1.ModelService": ("GetModel",),
}


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """Arguments with which grpc and grpc.aio open the same channel."""

    target: str
    options: tuple[tuple[str, Any], ...]
    credentials: grpc.ChannelCredentials | None
    """None: plain text."""


def channel_settings(
    target: str,
    *,
    tls: bool | TlsConfig,
    retry: RetryPolicy | None,
    keepalive: Keepalive | None,
    options: dict[str, Any],
) -> ChannelSettings:
    """Settings for one server. `options` are gRPC channel arguments and win over these.

    Raises:
        InvalidRequestError: the address or a certificate is wrong.
    """
    check_target(target)
    chosen: dict[str, Any] = {
        "grpc.primary_user_agent": f"loraplex-python/{__version__}",
        "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
        # A server that loads a model appears after seconds to minutes; gRPC would back off to two.
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2000,
        # Despite its name, how long one attempt may take, the TLS handshake included.
        "grpc.min_reconnect_backoff_ms": 10_000,
        "grpc.enable_retries": int(retry is not None),
    }
    if retry is not None:
        chosen["grpc.service_config"] = service_config(retry)
    if keepalive is not None:
        chosen["grpc.keepalive_time_ms"] = round(keepalive.interval_s * 1000)
        chosen["grpc.keepalive_timeout_ms"] = round(keepalive.timeout_s * 1000)
        # Or it is a minute, whatever the other says.
        chosen["grpc.http2.ping_timeout_ms"] = round(keepalive.timeout_s * 1000)
    if is_local(target):
        # gRPC obeys http_proxy even for loopback addresses.
        chosen["grpc.enable_http_proxy"] = 0
    if isinstance(tls, TlsConfig) and tls.server_name is not None:
        chosen["grpc.ssl_target_name_override"] = tls.server_name
    chosen.update(options)
    return ChannelSettings(target, tuple(chosen.items()), _credentials(tls))


def _credentials(tls: bool | TlsConfig) -> grpc.ChannelCredentials | None:
    if tls is False:
        return None
    config = TlsConfig() if tls is True else tls
    return grpc.ssl_channel_credentials(
        root_certificates=read_pem(config.ca, "tls.ca"),
        private_key=read_pem(config.key, "tls.key"),
        certificate_chain=read_pem(config.certificate, "tls.certificate"),
    )


def service_config(retry: RetryPolicy) -> str:
    """gRPC's JSON for `retry`. It commits to an attempt as soon as the server has answered anything."""
    config: dict[str, Any] = {
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method}
                    for service, methods in REPEATABLE.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": retry.max_attempts,
                    "initialBackoff": f"{retry.initial_backoff_s:.9f}s",
                    "maxBackoff": f"{retry.max_backoff_s:.9f}s",
                    "backoffMultiplier": retry.multiplier,
                    "retryableStatusCodes": [
                        "UNAVAILABLE",
                        *(["RESOURCE_EXHAUSTED"] if retry.when_full else []),
                    ],
                },
            }
        ]
    }
    if retry.budget is not None:
        config["retryThrottling"] = {"maxTokens": retry.budget, "tokenRatio": 0.2}
    return json.dumps(config)


def authorization(token: str | None, settings: ChannelSettings, allow_insecure_token: bool) -> str | None:
    """The value of the `authorization` metadata for `token`.

    Raises:
        InvalidRequestError: the token cannot stand in a header, or would cross a network in the clear.
    """
    if token is None:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise InvalidRequestError.for_field(
            "token", "must be printable ASCII without spaces; was a line end read with it?"
        )
    if settings.credentials is None and not is_local(settings.target) and not allow_insecure_token:
        raise InvalidRequestError.for_field(
            "token",
            f"would go to {settings.target} unencrypted; use tls=True, "
            "or allow_insecure_token=True where the network itself is trusted",
        )
    return f"Bearer {token}"


def check_target(target: str) -> None:
    """Refuses addresses that gRPC could not resolve, and would report later in an obscure text.

    Raises:
        InvalidRequestError: see there.
    """
    if "://" in target and target.split("://")[0] in ("http", "https", "grpc", "grpcs"):
        raise InvalidRequestError.for_field(
            "server", f"give HOST:PORT without {target.split('://')[0]}://; TLS is tls=True"
        )
    has_scheme = re.match(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):", target)
    if not has_scheme and not re.search(r"[^:]:\d{1,5}$", target):
        raise InvalidRequestError.for_field(
            "server", f"{target!r} has no port; give HOST:PORT, such as 127.0.0.1:50051"
        )


def is_local(target: str) -> bool:
    """True if `target` certainly stays on this machine."""
    scheme = re.match(r"(dns|ipv4|ipv6|unix|unix-abstract):", target)
    if scheme and scheme[1].startswith("unix"):
        return True
    address = target[scheme.end() :].rpartition("/")[2] if scheme else target
    host = re.sub(r":\d+$", "", address).removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
