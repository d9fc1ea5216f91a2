"""The id of a request: the client's own, or a new one."""

from __future__ import annotations

import re
import uuid

RULE = "has to be 1 to 128 printable ASCII characters without spaces"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def is_request_id(text: str) -> bool:
    """True where `text` may stand in logs: 1 to 128 printable ASCII characters without spaces."""
    return _REQUEST_ID.fullmatch(text) is not None


def request_id_or_new(text: object) -> str:
    """`text` if it is a request id, else 16 random hex digits."""
    return text if isinstance(text, str) and is_request_id(text) else uuid.uuid4().hex[:16]
