"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ``[T, H, D]`` with the first R values of each head rotated by cos and sin ``[T, R]``; new."""
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    crossed = torch.cat((-second, first), dim=-1)
    turned = turned * cos.unsqueeze(-2) + crossed * sin.unsqueeze(-2)
    return torch.cat((turned, rest), dim=-1)
