"""An adapter's folder as the messages of an upload."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from loraplex._requests import assign, named
from loraplex.errors import InvalidRequestError
from loraplex.v1 import adapters_pb2

CHUNK_BYTES = 1 << 20

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that an adapter may bring for prompts and answers; those that exist are sent too."""

Progress = Callable[[int, int], None]
"""Called with the bytes sent so far, and all there are."""


def upload_parts(
    name: str, folder: str | os.PathLike[str], load_inplace: bool, progress: Progress | None
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    """The messages, made as they are sent; the files are looked at now.

    Raises:
        InvalidRequestError: the folder is not what PEFT saves.
    """
    header = named(adapters_pb2.UploadHeader, name)
    assign(header, "load_inplace", load_inplace)
    weights = Path(folder) / "adapter_model.safetensors"
    try:
        assign(header, "config", (Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        header.size = weights.stat().st_size
        for text_file in TEXT_FILES:
            if (path := Path(folder) / text_file).is_file() and (size := path.stat().st_size):
                header.files.add(name=text_file, size=size)
    except (OSError, ValueError) as error:
        raise InvalidRequestError.for_field(
            "folder", f"{os.fspath(folder)!r} is no folder that PEFT saved as safetensors ({error})"
        ) from error
    return _parts(header, weights, progress)


def _parts(
    header: adapters_pb2.UploadHeader, weights: Path, progress: Progress | None
) -> Iterator[adapters_pb2.UploadAdapterRequest]:
    header.sha256 = _digest(weights)
    for announced in header.files:
        announced.sha256 = _digest(weights.with_name(announced.name))
    yield adapters_pb2.UploadAdapterRequest(header=header)
    total = header.size + sum(announced.size for announced in header.files)
    sent = 0
    for path in (weights, *(weights.with_name(announced.name) for announced in header.files)):
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield adapters_pb2.UploadAdapterRequest(chunk=chunk)
                sent += len(chunk)
                if progress is not None:
                    progress(sent, total)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
