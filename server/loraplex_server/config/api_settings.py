"""Settings of the API: addresses, limits and access."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from functools import partial
from typing import Annotated

from loraplex_server.config.declared import check
from loraplex_server.config.kinds import Count, File, OffSwitch, OptionalFile, Seconds, Size, Text
from loraplex_server.config.setting import NOT_NEGATIVE, POSITIVE, SECONDS, Group, Range, Setting
from loraplex_server.core.errors import InvalidArgumentError

_ENDPOINT = re.compile(r"https?://[^\s/@]+/?")
# gRPC counts milliseconds in 32 bits.
_KEEPALIVE = Range(above=0, below=2_000_000)

_serving = partial(Setting, group=Group.SERVING)
_access = partial(Setting, group=Group.ACCESS)


def is_loopback(host: str) -> bool:
    """True if only this machine can reach `host`; False if that is not sure."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """PEM files of both ports. With `client_ca`, clients need a certificate that one of it signed."""

    certificate: Annotated[
        File,
        _access(
            name="tls_certificate", help="PEM certificate chain of this server; read again when it changes"
        ),
    ]
    key: Annotated[File, _access(name="tls_key", help="PEM key of the certificate, without a password")]
    client_ca: Annotated[
        OptionalFile,
        _access(
            name="tls_client_ca",
            help="clients need a certificate signed by an authority in this PEM file",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Addresses and limits of the API, and the access to it.

    `tls` may be None, which is plain text, only on a loopback address or with `allow_insecure`.
    """

    host: Annotated[Text, _serving(help="address to listen on", metavar="HOST")] = "127.0.0.1"
    port: Annotated[Count, _serving(help="gRPC port; 0 picks a free one", range=NOT_NEGATIVE)] = 50051
    http_port: Annotated[
        Count,
        _serving(
            help="port of the OpenAI-compatible API; 0 picks a free one, -1 turns it off",
            range=Range(least=-1),
        ),
    ] = -1
    model_name: Annotated[
        Text,
        _serving(
            help="name of the base model for HTTP clients",
            metavar="NAME",
            default="the last part of its folder, or its hub id",
        ),
    ] = ""
    metrics_host: Annotated[
        Text,
        _serving(
            help="address of the metrics port",
            metavar="HOST",
            detail="The metrics are plain HTTP. Everybody who reaches the port can read them.",
        ),
    ] = "127.0.0.1"
    metrics_port: Annotated[
        Count,
        _serving(
            help="port of the Prometheus metrics and a status page; 0 picks a free one, -1 turns it off",
            range=Range(least=-1),
        ),
    ] = 9400
    max_message_bytes: Annotated[Size, _serving(help="longest gRPC message or HTTP body")] = 16 << 20
    max_tokens_per_message: Annotated[
        Count,
        _serving(
            help="most tokens joined into one message while a client reads too slowly; 1 joins none",
            range=POSITIVE,
            unit="tokens",
        ),
    ] = 256
    max_unread_tokens: Annotated[
        Count,
        _serving(
            help="a call ends with RESOURCE_EXHAUSTED when its client leaves more tokens than this unread",
            range=POSITIVE,
            unit="tokens",
        ),
    ] = 4096
    stall_s: Annotated[
        Seconds,
        _serving(
            name="stall_seconds",
            help="a stream ends with RESOURCE_EXHAUSTED when its client reads nothing for this long; 0 is "
            "never",
            range=SECONDS,
        ),
    ] = 60.0
    keepalive_s: Annotated[
        Seconds,
        _serving(
            name="keepalive",
            help="ping a connection that has been silent for this long",
            range=_KEEPALIVE,
        ),
    ] = 30.0
    keepalive_timeout_s: Annotated[
        Seconds,
        _serving(
            name="keepalive_timeout",
            help="close a connection that does not answer the ping within this time, and cancel its calls",
            range=_KEEPALIVE,
        ),
    ] = 10.0
    drain_s: Annotated[
        Seconds, _serving(name="drain_seconds", help="time that running calls get to finish after SIGTERM")
    ] = 30.0
    max_connection_age_s: Annotated[
        Seconds,
        _serving(
            name="max_connection_age",
            help="ask a client to reconnect when its connection is this old; running calls go on; 0 is never",
            range=SECONDS,
            detail="So load balancers can move clients to servers that started later.",
        ),
    ] = 0.0
    max_engine_restarts: Annotated[
        Count,
        _serving(
            help="how often in ten minutes the server may restart an engine that died; after that it exits",
            range=NOT_NEGATIVE,
        ),
    ] = 3
    reflection: Annotated[
        OffSwitch,
        _serving(
            name="no_reflection",
            help="turn off gRPC reflection, with which clients list the services",
            detail="Tools such as grpcurl need it.",
        ),
    ] = True
    otlp_endpoint: Annotated[
        Text,
        _serving(
            help="send traces to the OpenTelemetry collector at this gRPC address, such as "
            "http://127.0.0.1:4317; needs the extra tracing",
            metavar="URL",
            default="none",
        ),
    ] = ""
    tls: TlsFiles | None = None
    token_file: Annotated[
        OptionalFile,
        _access(
            help="clients need a bearer token whose hash is in this file; read again when it changes; see "
            "loraplex token --help"
        ),
    ] = None
    allow_insecure: Annotated[
        bool, _access(help="listen without TLS on an address that other machines can reach")
    ] = False

    def __post_init__(self) -> None:
        check(self)
        if self.otlp_endpoint and _ENDPOINT.fullmatch(self.otlp_endpoint) is None:
            raise InvalidArgumentError.field(
                "otlp_endpoint", f"{self.otlp_endpoint!r} is not a URL such as http://127.0.0.1:4317"
            )
        if self.tls is None and not self.allow_insecure and not is_loopback(self.host):
            raise InvalidArgumentError.field(
                "host",
                f"{self.host} is not a loopback address, and calls would not be encrypted; give "
                "--tls-certificate and --tls-key, or --allow-insecure if you trust the network",
            )
