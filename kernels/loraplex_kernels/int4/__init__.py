"""Affine 4-bit integers in groups along the input width: quantise, dequantise, multiply.

`matmul` works in fp32 on any CPU and in the activations' dtype elsewhere; `cpu_packed` holds the faster CPU
format with bf16 activations.
"""

from __future__ import annotations

from loraplex_kernels.int4.cpu_packed import PackedInt4Weight
from loraplex_kernels.int4.reference import Int4Weight, choose_group, dequantize, matmul, quantize

__all__ = ["Int4Weight", "PackedInt4Weight", "choose_group", "dequantize", "matmul", "quantize"]
