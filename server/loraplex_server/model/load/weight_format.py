"""The device and the weight format of a configuration, with "auto" resolved for this machine."""

from __future__ import annotations

import torch

from loraplex_server.config import ModelConfig
from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.model.layers.weights import WeightFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """The device that `device` names; "auto" is CUDA if there is a CUDA device, else the CPU.

    Raises:
        InvalidArgumentError: `device` is "cuda" and there is no CUDA device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError.field("device", "torch finds no CUDA device; use --device cpu")
    return torch.device(device)


def resolve_format(config: ModelConfig, device: torch.device) -> WeightFormat:
    """The weight format of `config` on `device`.

    The dtype "auto" is float32 on a CPU, bfloat16 on a GPU that supports it, and float16 on other GPUs. On a
    CPU, int4 is packed if the dtype is "auto" or bfloat16; packed products are in bf16, so a higher precision
    that the operator asks for excludes them.
    """
    dtype = config.dtype
    if dtype == "auto" and device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    packed = config.quantization == "int4" and device.type == "cpu" and dtype in ("auto", "bfloat16")
    return WeightFormat(
        quantization=config.quantization,
        dtype=_DTYPES["float32" if dtype == "auto" else dtype],
        device=device,
        double_quant=config.double_quant,
        packed_int4=packed,
    )
