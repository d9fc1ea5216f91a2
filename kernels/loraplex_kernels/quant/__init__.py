"""Weights in 4 bits, in NF4 or affine int4: quantise, dequantise, multiply.

- `nf4`, `int4`  the two formats: ``quantize``, and in plain torch ``dequantize`` and ``matmul``
- `cpu_packed`   int4 in the layout of torch's packed CPU kernel, for bf16 activations
- `matmul`       on a GPU: ``x @ dequantize(w).T + bias``, decoded on the way

`arrange_nf4` and `arrange_int4` repack a quantised weight once, at load, into a `BlockedWeight`: the order in
which the kernels read it. `matmul` multiplies by it, by families of the number of rows (see `tiles`). Several
weights of one width may be arranged as one, whose output rows follow each other.

Sums are float32, in a fixed order, without atomics: the same input gives the same bits. The result is rounded
once.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels import dense, dispatch
from loraplex_kernels.quant.blocked import (
    BLOCK,
    BlockedWeight,
    NestedScale,
    arrange_int4,
    arrange_nf4,
    dequantize,
    joinable_nf4,
)
from loraplex_kernels.quant.cpu_packed import PackedInt4Weight
from loraplex_kernels.quant.int4 import Int4Weight
from loraplex_kernels.quant.nf4 import NestedAbsmax, Nf4Weight
from loraplex_kernels.quant.reference import QuantWeight
from loraplex_kernels.quant.tiles import Plan

__all__ = [
    "BLOCK",
    "BlockedWeight",
    "Int4Weight",
    "NestedAbsmax",
    "NestedScale",
    "Nf4Weight",
    "PackedInt4Weight",
    "Plan",
    "QuantWeight",
    "arrange_int4",
    "arrange_nf4",
    "dequantize",
    "joinable_nf4",
    "matmul",
]


def matmul(x: Tensor, w: BlockedWeight, bias: Tensor | None = None, *, plan: Plan | None = None) -> Tensor:
    """``x @ dequantize(w).T + bias``. Inference only.

    Args:
        x: [..., K], fp32, fp16 or bf16, on the weight's device.
        w: weight of shape (N, K).
        bias: [N] or None.
        plan: tile shapes; default: those of the table in `tiles`.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: if x's last dimension is not K, or x, w and bias do not fit together.
    """
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension is {x.shape[-1]}, the weight's input width is {k}")
    if x.dtype not in dispatch.FLOATS:
        raise ValueError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.device != w.device:
        raise ValueError(f"x is on {x.device}, the weight on {w.device}: they must be on one device")
    if bias is not None and (bias.shape != (n,) or bias.device != x.device):
        raise ValueError(f"bias: expected [{n}] on {x.device}, got {list(bias.shape)} on {bias.device}")
    rows = x.reshape(-1, k)
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n)
    if dispatch.backend(x.device) == "triton":
        from loraplex_kernels.quant import launch

        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = launch.matmul(rows, w, bias, plan)
    else:
        dispatch.count(f"{w.format}.matmul", "torch")
        weight = dequantize(w, x.dtype)
        out = dense.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    return out.view(*x.shape[:-1], n)
