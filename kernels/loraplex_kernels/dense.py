"""Dense products on the library that is faster on a CPU.

For fp32, torch calls MKL, which leaves AVX-512 unused on processors that are not Intel's: oneDNN, which torch
carries for its other dtypes, is about twice as fast there from a few rows on, and no slower elsewhere.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# oneDNN's calls cost some 10 µs more than MKL's, and its matrix-vector products are no faster: measured
# crossover.
_MIN_ROWS = 3
_MIN_PRODUCTS = 1_500_000


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`. Inference only.

    Args:
        x: [..., K].
        weight: [N, K], any strides, dtype and device of x.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and x.numel() * weight.shape[0] >= _MIN_PRODUCTS
        and _has_onednn()
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


@functools.cache
def _has_onednn() -> bool:
    # an op is only there in builds of torch that carry oneDNN
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")
