"""The device and the weight format that a configuration means on this machine."""

from __future__ import annotations

import torch

from loraplex_server.config import ModelConfig
from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.model.layers.weights import WeightFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """The device that "auto" means here.

    Raises:
        InvalidArgumentError: CUDA was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError.field("device", "torch finds no CUDA device; use --device cpu")
    return torch.device(device)


def resolve_format(config: ModelConfig, device: torch.device) -> WeightFormat:
    """The weight format, "auto" dtype resolved: float32 on a CPU, bfloat16 on a GPU that has it.

    On a CPU, packed int4 multiplies in bf16: it is taken where the dtype is left open or is bf16, and left
    alone where more was asked for.
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
