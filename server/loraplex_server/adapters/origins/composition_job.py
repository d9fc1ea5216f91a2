"""Combines adapters with PEFT: a JSON object on stdin says which, two files in `output` are the result.

Runs as `python -m`, so that neither PEFT's memory nor its threads are the engine's. PEFT is given the base
model's modules without their weights, which no way of combining looks at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from loraplex_server.core.adapter_files import CONFIG_FILE, WEIGHTS_FILE

_RESULT = "result"
_NICENESS = 10
"""Of the job: it gives way to the engine's threads and to the API."""


def main() -> int:
    # What a library prints must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    spec = json.load(sys.stdin)
    refused, failed = "", 0
    try:
        combine(spec)
    except OSError as error:
        traceback.print_exc()
        failed = error.errno or errno.EIO
    except (ValueError, TypeError, RuntimeError, LookupError, NotImplementedError) as error:
        traceback.print_exc()
        refused = " ".join(str(error).split())[:500] or error.__class__.__name__
    with answer:
        json.dump({"refused": refused, "errno": failed}, answer)
    return 0


def combine(spec: dict[str, Any]) -> None:
    """Writes the combination that `spec` describes.

    Raises:
        ValueError: it would not be what its members are, or PEFT refuses; so do other errors of PEFT's.
        OSError: a file cannot be read or written.
    """
    names = [f"member{index}" for index in range(len(spec["members"]))]
    model: PeftModel | None = None
    for name, member in zip(names, spec["members"], strict=True):
        config, tensors = _read(member)
        if model is None:
            model = PeftModel(_shell(spec["sites"]), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        loaded = set_peft_model_state_dict(model, tensors, adapter_name=name)
        if loaded.unexpected_keys:
            raise ValueError(f"tensor {loaded.unexpected_keys[0]} was not taken")
    assert model is not None
    torch.manual_seed(spec["seed"])
    model.base_model.add_weighted_adapter(
        names,
        spec["weights"],
        _RESULT,
        combination_type=spec["combination_type"],
        svd_rank=spec["svd_rank"],
        # The rows beyond the rank are cut off in any case.
        svd_full_matrices=False,
        density=spec["density"],
        majority_sign_method=spec["majority_sign"],
    )
    _check_whole(model, names)
    tensors = get_peft_model_state_dict(model, adapter_name=_RESULT, save_embedding_layers=False)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {key} of the result holds NaN or infinity")
    folder = Path(spec["output"])
    _save({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    config = model.peft_config[_RESULT]
    settings = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=1, sort_keys=True))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises: OSError: it cannot be written."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The error of the system is there as text alone.
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _read(member: dict[str, Any]) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    contents: dict[str, bytes] = {
        name: (Path(member["folder"]) / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)
    }
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != member[name]:
            raise ValueError(f"{name} of a member was changed while it was read; try again")
    config = PeftConfig.from_peft_type(**json.loads(contents[CONFIG_FILE]))
    config.inference_mode = True
    config.task_type = None
    tensors = load(contents[WEIGHTS_FILE])
    return config, {name: tensor for name, tensor in tensors.items() if name not in member["base_tables"]}


def _shell(sites: Iterable[tuple[str, int, int, bool]]) -> torch.nn.Module:
    """The base model's projections, head and embedding (the last of each site) by path, all of their weights
    one zero.
    """
    root = torch.nn.Module()
    for path, in_features, out_features, is_embedding in sites:
        parent, _, leaf = path.rpartition(".")
        node = root
        for part in filter(None, parent.split(".")):
            if part not in dict(node.named_children()):
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        made: torch.nn.Linear | torch.nn.Embedding
        if is_embedding:
            made = torch.nn.Embedding(in_features, out_features, device="meta")
        else:
            made = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
        weight = torch.zeros(1, 1).expand(made.weight.shape)
        made.weight = torch.nn.Parameter(weight, requires_grad=False)
        node.add_module(leaf, made)
    return root


def _check_whole(model: PeftModel, names: Iterable[str]) -> None:
    """Every module that a member acts on has its part of the result."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            held = {*module.lora_A, *module.lora_embedding_A}
            acting = [name for name in names if name in held and _RESULT not in held]
            if acting:
                raise ValueError(
                    f"the result would leave out {path.removeprefix('base_model.model.')}, on which a member "
                    "acts: it gets layers_to_transform and exclude_modules from the first member"
                )


if __name__ == "__main__":
    raise SystemExit(main())
