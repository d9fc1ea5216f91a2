"""The tracing that the operator has asked for."""

from __future__ import annotations

from loraplex_server.api.telemetry.tracing.spans import NoTracing, Tracing
from loraplex_server.core.errors import FailedPreconditionError


def start_tracing(endpoint: str, model: str, version: str) -> Tracing:
    """Sends spans to the collector at `endpoint` (--otlp-endpoint); none where that is "".

    Raises:
        FailedPreconditionError: what it needs is not installed.
    """
    if not endpoint:
        return NoTracing()
    try:
        from loraplex_server.api.telemetry.tracing.otlp import OtlpTracing
    except ImportError as error:
        raise FailedPreconditionError(
            f"--otlp-endpoint needs {error.name}, which is not installed; "
            "in a checkout: pip install '.[tracing]'"
        ) from error
    return OtlpTracing(endpoint, model, version)
