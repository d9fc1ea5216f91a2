"""Names of enum values as the server's own types have them."""

from __future__ import annotations

from typing import Any


def enum_text(kind: Any, number: int) -> str:
    """The last part of an enum value's name in lower case; "" for one that this server does not know.

    `COMBINATION_TYPE_TIES_SVD` of `CombinationType` is "ties_svd".
    """
    if number not in kind.values():
        return ""
    prefix = "".join(f"_{char}" if char.isupper() else char for char in kind.DESCRIPTOR.name)
    return str(kind.Name(number)).removeprefix(f"{prefix.removeprefix('_').upper()}_").lower()
