"""Times of a call for its trailing metadata, written as in HTTP's Server-Timing header.

    server-timing: total;dur=412.7, queue;dur=3.1, adapter;dur=0.0, ttft;dur=41.9

Milliseconds on the server. `total` is there for every call; a generation adds how long it waited to be
scheduled, the part of that spent on its adapters, and the time to its first token: of several answers in one
call the longest.
"""

from __future__ import annotations

import contextvars

from loraplex_server.api.answers.answer import End

KEY = "server-timing"

# Shared by the tasks that a call starts.
_parts: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("timings", default=None)


def begin() -> None:
    """A call begins."""
    _parts.set({})


def note(end: End) -> None:
    """One of the call's generations has ended."""
    parts, times = _parts.get(), end.finish.times
    if parts is None:
        return
    found = {
        "queue": times.queue_s if times else 0.0,
        "adapter": times.adapter_wait_s if times else 0.0,
        "ttft": end.first_token_s,
    }
    for name, seconds in found.items():
        parts[name] = max(seconds, parts.get(name, 0.0))


def told(total_s: float) -> str:
    """The value of `KEY` for a call that took so long."""
    parts = {"total": total_s, **(_parts.get() or {})}
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in parts.items())
