"""Logging of the server processes: lines on stderr that carry the id of the request they belong to."""

from __future__ import annotations

import contextvars
import logging
import sys

LEVELS = ("debug", "info", "warning", "error")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


class _RequestIdFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure(level: str) -> None:
    """Sends this package's log to stderr from `level` (one of `LEVELS`) on, other packages' warnings too.

    stdout stays for the one line that scripts wait for.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestIdFilter())
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname).1s %(name)s [%(request_id)s] %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("loraplex_server").setLevel(level.upper())
