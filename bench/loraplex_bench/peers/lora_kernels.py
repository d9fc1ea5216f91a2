"""Other projects' LoRA kernels, from their files.

The files are not part of this repository: whoever wants the comparison puts them into `bench/.peers/`,
which git ignores (see `FILES`; the files of one release of each project, under these names)::

    bench/.peers/vllm/      from vllm/lora/ops/triton_ops/
    bench/.peers/sglang/    from sglang/kernels/ops/lora/dense/

vLLM's tuned configurations (``<card>_SHRINK.json``, ``<card>_EXPAND_TRUE.json``) are used where they lie in
`bench/.peers/vllm/configs/`; SGLang's where they lie in `bench/.peers/sglang/csgmv_configs/`. The little that
the files import from the rest of their projects is stood in for here. A peer that cannot run says why.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILES = {
    "vllm": (
        "kernel_utils.py",
        "utils.py",
        "lora_shrink_op.py",
        "lora_expand_op.py",
        "lora_kernel_metadata.py",
    ),
    "sglang": ("lora_tuning_config.py", "chunked_sgmv_shrink.py", "chunked_sgmv_expand.py"),
}


class PeerFilesError(Exception):
    """A peer's files cannot be used; the text says why."""


class VllmKernels(NamedTuple):
    """Launchers, and the class that makes a batch's index tensors."""

    shrink: Callable[..., None]
    expand: Callable[..., None]
    metadata: Any


class SglangKernels(NamedTuple):
    """Launchers."""

    shrink: Callable[..., Tensor]
    expand: Callable[..., Tensor]


def load_vllm(folder: Path) -> VllmKernels:
    """vLLM's `_lora_shrink` and `_lora_expand`. Raises `PeerFilesError`."""
    _need(folder, FILES["vllm"])
    import triton
    import triton.language

    configs = folder / "configs"
    if configs.is_dir():
        os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(configs)

    def next_power_of_2(n: int) -> int:
        return 1 if n < 1 else 1 << (n - 1).bit_length()

    def async_tensor_h2d(data: Any, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    cuda = torch.cuda.is_available()
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm.envs": {
            "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_LORA_DISABLE_PDL": False,
            "VLLM_LORA_DETERMINISTIC_SPLIT_K": False,
            "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        },
        "vllm.triton_utils": {"tl": triton.language, "triton": triton},
        "vllm.logger": {"init_logger": lambda name: _Silence()},
        "vllm.platforms": {
            "current_platform": types.SimpleNamespace(
                is_cuda=lambda: cuda,
                has_device_capability=lambda least: (
                    cuda and torch.cuda.get_device_capability() >= divmod(least, 10)
                ),
            )
        },
        "vllm.utils.math_utils": {"next_power_of_2": next_power_of_2},
        # An AttributeError here makes the files export their plain functions.
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": _refuse,
            "async_tensor_h2d": async_tensor_h2d,
        },
        "vllm.model_executor.layers.batch_invariant": {"vllm_is_batch_invariant": lambda: False},
    }
    modules = _import_files(folder, "vllm.lora.ops.triton_ops", FILES["vllm"], stand_ins)
    return VllmKernels(
        modules["lora_shrink_op"]._lora_shrink,
        modules["lora_expand_op"]._lora_expand,
        modules["lora_kernel_metadata"].LoRAKernelMeta,
    )


def load_sglang(folder: Path) -> SglangKernels:
    """SGLang's csgmv backend. Raises `PeerFilesError`."""
    _need(folder, FILES["sglang"])
    flag = types.SimpleNamespace(get=lambda: False)
    if (folder / "csgmv_configs").is_dir():
        os.environ["SGLANG_LORA_CONFIG_DIR"] = str(folder)
    stand_ins: dict[str, dict[str, Any]] = {
        "sglang.srt.environ": {
            "envs": types.SimpleNamespace(
                SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=flag, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=flag
            )
        },
        "sglang.srt.lora.utils": {"LoRABatchInfo": object},
        "sglang.srt.utils": {
            # It only shortens the launch on the host, which a captured graph leaves out anyway.
            "cached_triton_kernel": lambda key_fn=None: lambda kernel: kernel,
            "get_device_name": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }
    modules = _import_files(folder, "sglang.kernels.ops.lora.dense", FILES["sglang"], stand_ins)
    return SglangKernels(
        modules["chunked_sgmv_shrink"].chunked_sgmv_lora_shrink_forward,
        modules["chunked_sgmv_expand"].chunked_sgmv_lora_expand_forward,
    )


class _Silence:
    """A logger that says nothing, under whatever name."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def _refuse(*arguments: object, **named: object) -> None:
    raise AttributeError("custom operators are not registered here")


def _need(folder: Path, files: Sequence[str]) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise PeerFilesError(f"bench/.peers/{folder.name} lacks {', '.join(missing)}")
    if importlib.util.find_spec("triton") is None:
        raise PeerFilesError("triton is not installed")


def _import_files(
    folder: Path, package: str, files: Sequence[str], stand_ins: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The files as modules of `package`, beside modules that have what they import from elsewhere."""
    for name in [*stand_ins, package]:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            _ensure_package(".".join(parts[:depth]))
    for name, contents in stand_ins.items():
        sys.modules[name].__dict__.update(contents)
    modules = {}
    for file in files:
        stem = file.removesuffix(".py")
        name = f"{package}.{stem}"
        spec = importlib.util.spec_from_file_location(name, folder / file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise PeerFilesError(f"{file} does not load here: {error}") from error
        modules[stem] = module
    return modules


def _ensure_package(name: str) -> None:
    if name in sys.modules:
        return
    module = types.ModuleType(name)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
