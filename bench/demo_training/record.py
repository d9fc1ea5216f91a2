"""Writes the demo model's training record: how it was trained, what it answers, what its files hash to."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_training.adapter_training import ADAPTERS, AdapterRecipe
from demo_training.base_training import BaseRecipe
from demo_training.check import accuracies, load_tokenizer, load_with_adapters
from demo_training.leaks import unnoticed_leaks
from demo_training.quantization import MODES
from loraplex_bench.demo.tasks import CHECK_SEED, MAX_LINE_LENGTH, MIN_LINE_LENGTH, make_lines

_LEAK_LINES = 16
_HARDWARE = "2-core x86-64 CPU, busy with other work; one torch thread per run"


def weights_hashes(data: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file under `data`, by its path within it."""
    files = sorted(data.rglob("*.safetensors"))
    return {
        path.relative_to(data).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def write_record(data: Path, work: Path, num_lines: int) -> None:
    """Checks base and adapters on `num_lines` fresh lines each and writes `TRAINING.json` into `data`."""
    names = list(ADAPTERS)
    exact = accuracies(data / "base", data / "adapters", names, MODES, make_lines(CHECK_SEED, num_lines))
    model = load_with_adapters(data / "base", data / "adapters", names, "nf4")
    tokenizer = load_tokenizer(data / "base")
    others: dict[str, list[str | None]] = {
        name: [None, names[index - 1], names[index - 5], names[index - 9]] for index, name in enumerate(names)
    }
    unnoticed = {name: unnoticed_leaks(model, tokenizer, name, others[name], _LEAK_LINES) for name in names}
    record = {
        "hardware": _HARDWARE,
        "software": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "tokenizers", "safetensors")},
        "lines": {"shortest": MIN_LINE_LENGTH, "longest": MAX_LINE_LENGTH},
        "check": {
            "lines": num_lines,
            "seed": CHECK_SEED,
            "how": "greedy generation by transformers and PEFT, float32 compute, to the end of sequence; "
            "the answer must be exact",
            "unnoticed_leaks": "fraction of right answers although another adapter, or none, ran over the "
            "prompt alone or over the decoded tokens alone",
        },
        "base": {"recipe": asdict(BaseRecipe()), **_run(work, "base"), "exact": exact["base"]},
        "adapter_recipe": {**asdict(AdapterRecipe()), "trained_on": "nf4"},
        "adapters": {
            name: {
                **asdict(spec),
                **_run(work, name),
                "exact": exact[name],
                "unnoticed_leaks": unnoticed[name],
            }
            for name, spec in ADAPTERS.items()
        },
        "sha256": weights_hashes(data),
    }
    (data / "TRAINING.json").write_text(json.dumps(record, indent=1) + "\n")


def _run(work: Path, name: str) -> dict[str, Any]:
    path = work / "runs" / f"{name}.json"
    run: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return run
