"""Untrusted text, made safe to show in messages."""

from __future__ import annotations


def quoted(text: object, limit: int = 160) -> str:
    """`text` in quotes for a message: ASCII only, and at most `limit` characters."""
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"
