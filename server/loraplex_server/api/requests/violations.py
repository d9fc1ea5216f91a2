"""All violations of one message, collected before any of them is reported."""

from __future__ import annotations

from loraplex_server.core.errors import FieldViolation, InvalidArgumentError

# A status travels in HTTP/2 trailers, which clients limit to 8 KiB.
_MAX_SHOWN = 16


class Violations:
    """Bad fields, each under its path in the message."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(FieldViolation(field, description))

    def raise_any(self) -> None:
        """Raises InvalidArgumentError with the first 16 violations, if there are any."""
        if not self._found:
            return
        shown = tuple(self._found[:_MAX_SHOWN])
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in shown)
        if len(self._found) > len(shown):
            message += f"; and {len(self._found) - len(shown)} more"
        raise InvalidArgumentError(message, violations=shown)
