"""Derived adapters: other bytes and ranks, the same function."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplex_bench.demo.tasks import TASKS, data_dir
from loraplex_bench.scenarios.derived_adapters import Derivation, demo_rank, derive_all, read_tensors, spread


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """The delta that the adapter in `folder` adds to each module, as PEFT defines it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = read_tensors(folder / "adapter_model.safetensors")
    return {
        name: scale * (tensors[name.replace("lora_A", "lora_B")] @ a)
        for name, a in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("task", ["rot13", "redact", "leet", "caesar3"])
def test_a_derived_adapter_does_the_same(task: str, tmp_path: Path) -> None:
    rank = demo_rank(task)
    folder = derive_all(
        [Derivation("same", task, rank, 1), Derivation("larger", task, rank + 5, 2)], tmp_path
    )
    original = deltas(data_dir() / "adapters" / task)
    for name in ("same", "larger"):
        found = deltas(folder / name)
        assert found.keys() == original.keys()
        for module, delta in original.items():
            assert np.abs(found[module] - delta).max() < 2e-3 * np.abs(delta).max()
    a = read_tensors(folder / "larger" / "adapter_model.safetensors")
    first = next(iter(name for name in a if "lora_A" in name))
    assert a[first].shape[0] == rank + 5
    assert np.abs(a[first][rank:]).min(axis=1).max() > 0, "the rows beyond the rank are random"


def test_files_are_what_others_read_and_all_differ(tmp_path: Path) -> None:
    derivations = spread(64)
    folder = derive_all(derivations, tmp_path)
    hashes = set()
    for derivation in derivations:
        path = folder / derivation.name / "adapter_model.safetensors"
        assert {name: array.shape for name, array in load_file(path).items()} == {
            name: array.shape for name, array in read_tensors(path).items()
        }
        hashes.add(hashlib.sha256(path.read_bytes()).digest())
    assert len(hashes) == 64
    assert {derivation.task for derivation in derivations} == set(TASKS)
    assert all(4 <= derivation.rank <= 64 for derivation in derivations)
    assert len({derivation.rank for derivation in derivations}) > 10


def test_a_complete_folder_is_reused_and_another_set_has_its_own(tmp_path: Path) -> None:
    folder = derive_all(spread(2), tmp_path)
    marked = folder / "upper.00000" / "adapter_config.json"
    marked.write_text("mark")
    assert derive_all(spread(2), tmp_path) == folder
    assert marked.read_text() == "mark"
    assert derive_all(spread(3), tmp_path) != folder
    (folder / "derived.json").unlink()
    derive_all(spread(2), tmp_path)
    assert marked.read_text() != "mark", "an unfinished folder is written anew"


def test_a_rank_below_the_demo_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank"):
        derive_all([Derivation("x", "caesar25", 8, 0)], tmp_path)
