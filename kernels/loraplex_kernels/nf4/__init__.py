"""NF4, the 4-bit NormalFloat of QLoRA: quantise, dequantise, multiply without a dense copy of the weight."""

from __future__ import annotations

from loraplex_kernels.nf4.reference import NF4_LEVELS, NestedAbsmax, Nf4Weight, dequantize, matmul, quantize

__all__ = ["NF4_LEVELS", "NestedAbsmax", "Nf4Weight", "dequantize", "matmul", "quantize"]
