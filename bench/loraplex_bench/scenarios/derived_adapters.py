"""Thousands of adapters with known answers, from the demo's few: the function is kept, the bytes are not.

With Q orthogonal, (B Qᵀ)(Q A) = B A: so each derived adapter has bytes, and a hash, of its own. Its rank
grows by zero columns of B and random rows of A, which add nothing; alpha grows along, for the scale to stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraplex_bench.demo.tasks import TASKS, data_dir

VERSION = 1
"""Grows when the same derivation gives other files."""

_CONFIG, _WEIGHTS, _COMPLETE = "adapter_config.json", "adapter_model.safetensors", "derived.json"

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True)
class Derivation:
    """One adapter to be: `task` names the demo's adapter that it does the same as.

    Attributes:
        rank: no less than that of the demo's adapter.
        seed: another seed gives another Q and other random rows.
    """

    name: str
    task: str
    rank: int
    seed: int


def spread(count: int, *, seed: int = 0, low: int = 4, high: int = 64) -> list[Derivation]:
    """`count` derivations over all tasks in turn, ranks drawn evenly on a logarithmic scale."""
    rng = random.Random(f"ranks {seed}")
    tasks = list(TASKS)
    return [
        Derivation(
            f"{tasks[index % len(tasks)]}.{index:05d}",
            tasks[index % len(tasks)],
            max(demo_rank(tasks[index % len(tasks)]), round(low * (high / low) ** rng.random())),
            index,
        )
        for index in range(count)
    ]


def demo_rank(task: str) -> int:
    """Rank of the demo's adapter."""
    rank: int = _read_config(_source(task))["r"]
    return rank


def derive_all(
    derivations: Sequence[Derivation], work: Path, progress: Callable[[int], None] | None = None
) -> Path:
    """A folder under `work` with an adapter folder for each; one that an earlier call completed is reused."""
    folder = work / f"loraplex-derived-{_key(derivations)}"
    if (folder / _COMPLETE).is_file():
        return folder
    sources = {task: _Source.read(task) for task in {derivation.task for derivation in derivations}}
    for number, derivation in enumerate(derivations):
        sources[derivation.task].derive(derivation, folder / derivation.name)
        if progress is not None:
            progress(number + 1)
    (folder / _COMPLETE).write_text(json.dumps({"version": VERSION, "adapters": len(derivations)}) + "\n")
    return folder


@dataclasses.dataclass(frozen=True)
class _Source:
    """A demo adapter, read: (A, B) by the name of the module."""

    config: dict[str, Any]
    pairs: dict[str, tuple[Array, Array]]

    @classmethod
    def read(cls, task: str) -> _Source:
        tensors = read_tensors(_source(task) / _WEIGHTS)
        mark = ".lora_A.weight"
        pairs = {
            name.removesuffix(mark): (a, tensors[name.replace("lora_A", "lora_B")])
            for name, a in tensors.items()
            if name.endswith(mark)
        }
        return cls(_read_config(_source(task)), pairs)

    def derive(self, derivation: Derivation, folder: Path) -> None:
        rank, target = self.config["r"], derivation.rank
        if target < rank:
            raise ValueError(f"rank: {derivation.name} cannot have {target}, {derivation.task} has {rank}")
        rng = np.random.default_rng(derivation.seed)
        rotation = np.linalg.qr(rng.standard_normal((rank, rank)))[0].astype(np.float32)
        tensors: dict[str, Array] = {}
        for module, (a, b) in self.pairs.items():
            spread_a = float(np.abs(a).mean())
            more_a = rng.standard_normal((target - rank, a.shape[1]), np.float32) * spread_a
            more_b = np.zeros((b.shape[0], target - rank), np.float32)
            tensors[f"{module}.lora_A.weight"] = np.concatenate([rotation @ a, more_a])
            tensors[f"{module}.lora_B.weight"] = np.concatenate([b @ rotation.T, more_b], axis=1)
        grown = target / rank
        alpha = self.config["lora_alpha"] * (math.sqrt(grown) if self.config["use_rslora"] else grown)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps({**self.config, "r": target, "lora_alpha": alpha}))
        write_tensors(folder / _WEIGHTS, tensors)


def read_tensors(path: Path) -> dict[str, Array]:
    """A safetensors file of bfloat16, float16 or float32, as float32."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, info in json.loads(raw[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        if info["dtype"] == "BF16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[info["dtype"]]).astype(np.float32)
        tensors[name] = values.reshape(info["shape"])
    return tensors


def write_tensors(path: Path, tensors: dict[str, Array]) -> None:
    """A safetensors file in float16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts = []
    end = 0
    for name in sorted(tensors):
        data = tensors[name].astype("<f2").tobytes()
        header[name] = {
            "dtype": "F16",
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(parts)


def _key(derivations: Sequence[Derivation]) -> str:
    digest = hashlib.sha256(repr((VERSION, list(derivations))).encode())
    for task in sorted({derivation.task for derivation in derivations}):
        digest.update((_source(task) / _WEIGHTS).read_bytes())
    return digest.hexdigest()[:16]


def _source(task: str) -> Path:
    return data_dir() / "adapters" / task


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    return config
