"""The chat template that an adapter brings, in one of the two files in which trainers save it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loraplex_server.adapters.files.folder import read_file
from loraplex_server.adapters.spec.fields import parse_object
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.core.adapter_files import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE

MAX_CHAT_TEMPLATE_BYTES = 256 << 10
"""Longest template: many times those of published models."""

_MAX_TOKENIZER_BYTES = 16 << 20
"""Largest `tokenizer_config.json`, which may list every added token."""


def read_chat_template(folder: Path, roots: Iterable[Path]) -> str:
    """The template in an adapter's folder, "" where there is none. It is not rendered or checked here.

    `chat_template.jinja` goes before the `chat_template` of `tokenizer_config.json`, as in transformers.

    Raises:
        MalformedFileError: a file is too long, or is not what its name says.
        FailedPreconditionError, PermissionDeniedError, UnavailableError: as `open_file`.
    """
    roots = tuple(roots)
    if (folder / CHAT_TEMPLATE_FILE).exists():
        body = read_file(folder, CHAT_TEMPLATE_FILE, roots, MAX_CHAT_TEMPLATE_BYTES)
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise MalformedFileError(f"{CHAT_TEMPLATE_FILE} is not UTF-8") from error
    if not (folder / TOKENIZER_CONFIG_FILE).exists():
        return ""
    body = read_file(folder, TOKENIZER_CONFIG_FILE, roots, _MAX_TOKENIZER_BYTES)
    template = parse_object(body, TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(template, list):
        # Several, by name; that for plain conversations is called so.
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    if template is None:
        return ""
    if not isinstance(template, str) or len(template) > MAX_CHAT_TEMPLATE_BYTES:
        raise MalformedFileError(
            f"chat_template in {TOKENIZER_CONFIG_FILE} is not a text of at most {MAX_CHAT_TEMPLATE_BYTES} "
            "characters"
        )
    return template
