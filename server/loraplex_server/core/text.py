"""Text of others, made fit to be shown."""

from __future__ import annotations


def quoted(text: object, limit: int = 160) -> str:
    """`text` as it can be shown in any message: ASCII only, and not longer than `limit`."""
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"
