"""Strides for the kernels: any, except in the last dimension, which must be contiguous."""

from __future__ import annotations

from torch import Tensor


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor` with contiguous values in its last dimension; copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
