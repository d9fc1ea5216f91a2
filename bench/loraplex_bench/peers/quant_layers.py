"""4-bit weights as gemlite and bitsandbytes hold them, from the installed packages or from `bench/.peers/`.

bench/.peers/gemlite/   gemlite; `make bench-peers` puts it there
bench/.peers/bnb/       bitsandbytes with the library of one version of CUDA, likewise
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from loraplex_bench.peers.folder import FOLDER
from loraplex_kernels.quant import int4


def gemlite_layer(weight: int4.Int4Weight) -> Any:
    """The weight as a layer of gemlite's, tuned by its authors' table for the card or as they advise."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    import gemlite
    from gemlite import core
    from gemlite.core import DType, GemLiteLinear

    if not core.GEMLITE_TRITON_CONFIG_CACHE:
        gemlite.set_autotune("max")
    n, k = weight.shape
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=2).view(n, k)
    scale = weight.scale.clamp(min=1e-8)
    zero = 8 - weight.zero / scale
    layer = GemLiteLinear(
        4,
        group_size=weight.group,
        in_features=k,
        out_features=n,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(codes, scale.view(-1, 1).bfloat16(), zero.view(-1, 1).bfloat16(), None)
    return layer


def bitsandbytes_nf4(weight: torch.Tensor) -> Any:
    """(codes, state) of bitsandbytes' NF4."""
    import bitsandbytes

    return bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")


def bitsandbytes_multiply(weight: Any, x: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` by bitsandbytes."""
    import bitsandbytes

    codes, state = weight
    product: torch.Tensor = bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)
    return product


def bitsandbytes_dequantize(weight: Any) -> torch.Tensor:
    """The weight that the codes stand for, float32."""
    import bitsandbytes

    dense: torch.Tensor = bitsandbytes.functional.dequantize_4bit(*weight)
    return dense.float()
