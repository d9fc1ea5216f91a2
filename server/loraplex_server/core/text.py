"""Untrusted text, made safe to show."""

from __future__ import annotations


def quoted(text: object, limit: int = 160) -> str:
    """`text` as any message can show it: quoted ASCII of at most `limit` characters."""
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"
