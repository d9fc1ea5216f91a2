"""The parts of a server that every transport works with."""

from __future__ import annotations

import dataclasses

from loraplex_server.api.answers.generator import Generator
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests.deadlines import FastestAnswer
from loraplex_server.api.requests.intake import Intake
from loraplex_server.api.security.authentication import Authenticator
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import Tracing


@dataclasses.dataclass(frozen=True)
class Services:
    """One of each, made before any port is open.

    Attributes:
        version: of the server, as clients are told it.
    """

    lifecycle: Lifecycle
    metrics: Metrics
    authenticator: Authenticator
    tracing: Tracing
    intake: Intake
    generator: Generator
    version: str


def make_services(authenticator: Authenticator, tracing: Tracing, version: str) -> Services:
    """Services that refuse all calls until their lifecycle has a backend."""
    lifecycle, metrics, fastest = Lifecycle(), Metrics(), FastestAnswer()
    return Services(
        lifecycle=lifecycle,
        metrics=metrics,
        authenticator=authenticator,
        tracing=tracing,
        intake=Intake(lifecycle, fastest),
        generator=Generator(lifecycle, metrics, tracing, fastest),
        version=version,
    )
