"""Affine 4-bit integers in groups along the input width: quantise, dequantise, multiply."""

from __future__ import annotations

from loraplex_kernels.int4.reference import Int4Weight, choose_group, dequantize, matmul, quantize

__all__ = ["Int4Weight", "choose_group", "dequantize", "matmul", "quantize"]
