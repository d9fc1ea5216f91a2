"""The built-in page, and the headers that keep it to itself."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re


@functools.cache
def page() -> bytes:
    """The whole page, UTF-8: one file with its style and its script, which reads `/metrics`."""
    return importlib.resources.files(__package__).joinpath("page.html").read_bytes()


@functools.cache
def headers() -> tuple[tuple[str, str], ...]:
    """Headers of the page: only its own style and script may run, and it may ask this server alone."""
    text = page().decode()
    policy = (
        "default-src 'none'",
        f"script-src {_hashes('script', text)}",
        f"style-src {_hashes('style', text)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return (
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", "; ".join(policy)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-cache"),
    )


def _hashes(element: str, text: str) -> str:
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
