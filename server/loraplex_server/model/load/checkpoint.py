"""Reading a Hugging Face checkpoint: its folder, and its tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from loraplex_server.core.errors import FailedPreconditionError, NotFoundError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def locate(model: str) -> Path:
    """The folder of a checkpoint: `model` itself, or the hub's snapshot, downloaded unless it is cached.

    Raises:
        NotFoundError: `model` is neither a folder nor a hub id that can be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise NotFoundError(
            f"--model {model!r} is not a folder, and cannot be downloaded from the hub: {error}",
            resource=("model", model),
        ) from error


class Checkpoint:
    """The safetensors files of one folder, memory-mapped.

    Raises:
        FailedPreconditionError: there is no such file (pickled weights are never read), or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text())
            self._file_of = {name: folder / file for name, file in index["weight_map"].items()}
        elif (folder / _SINGLE).is_file():
            with _open(folder / _SINGLE) as file:
                self._file_of = dict.fromkeys(file.keys(), folder / _SINGLE)
        else:
            raise FailedPreconditionError(
                f"the model's folder holds neither {_INDEX} nor {_SINGLE}; save the model as safetensors"
            )

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.stat().st_size for file in set(self._file_of.values()))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name, sorted by file and then by name.

        A tensor is a view of the mapped file: copy it to keep it.
        """
        by_file: dict[Path, list[str]] = {}
        for name, path in sorted(self._file_of.items(), key=lambda item: (item[1].name, item[0])):
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with _open(path) as file:
                for name in names:
                    yield name, file.get_tensor(name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise FailedPreconditionError(f"{path.name} cannot be read as safetensors: {error}") from error
