"""All violations of one message, collected before any of them is reported."""

from __future__ import annotations

from collections.abc import Iterable

from loraplex_server.core.errors import FieldViolation, InvalidArgumentError


class Violations:
    """Bad fields, each under its path in the message."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(FieldViolation(field, description))

    def extend(self, found: Iterable[FieldViolation]) -> None:
        self._found.extend(found)

    def raise_any(self) -> None:
        """Raises InvalidArgumentError with the violations, if there are any."""
        if self._found:
            raise InvalidArgumentError.fields(self._found)
