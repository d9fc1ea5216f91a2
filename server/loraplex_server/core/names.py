"""The one rule for the name of an adapter."""

from __future__ import annotations

import re

from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.core.text import quoted

_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,128}")


def is_name(name: str) -> bool:
    """True if `name` is 1 to 128 letters, digits, '.', '_' or '-', and not only dots."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises InvalidArgumentError unless `is_name(name)`."""
    if not is_name(name):
        raise InvalidArgumentError.field(
            "name",
            f"{quoted(name)} is not an adapter name; "
            "use 1 to 128 letters, digits, '.', '_' or '-', and not dots alone",
        )
