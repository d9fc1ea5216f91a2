"""The chat template that an adapter brings: a text file beside its weights, as trainers save it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loraplex_server.adapters.sources import open_file
from loraplex_server.adapters.tensor_file import MalformedFileError

CHAT_TEMPLATE_FILE = "chat_template.jinja"
MAX_CHAT_TEMPLATE_BYTES = 256 << 10


def read_chat_template(folder: Path, roots: Iterable[Path]) -> str:
    """The template in an adapter's folder, "" where there is none. It is not rendered or checked here.

    Raises:
        MalformedFileError: it is too long, or no UTF-8.
        FailedPreconditionError, PermissionDeniedError, UnavailableError: as `open_file`.
    """
    if not (folder / CHAT_TEMPLATE_FILE).exists():
        return ""
    file, size = open_file(folder, CHAT_TEMPLATE_FILE, roots)
    with file:
        if size > MAX_CHAT_TEMPLATE_BYTES:
            raise MalformedFileError(
                f"{CHAT_TEMPLATE_FILE} has {size} bytes; at most {MAX_CHAT_TEMPLATE_BYTES} are read"
            )
        try:
            return file.read(MAX_CHAT_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise MalformedFileError(f"{CHAT_TEMPLATE_FILE} is no UTF-8") from error
