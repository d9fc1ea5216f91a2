"""RMS norm in plain torch: op for op, and cast for cast, what transformers' modules do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Form = Literal["rounded", "single", "offset"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """One norm.

    Attributes:
        weight: [N], in the dtype of the rows.
        eps: added to the mean square.
        form: how the weight is applied.
    """

    weight: Tensor
    eps: float
    form: Form


def rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    """The norm of x ``[..., N]``."""
    wide = x.to(torch.float32)
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.form == "rounded":
        return norm.weight * y.to(x.dtype)
    weight = norm.weight.to(torch.float32)
    return (y * (1.0 + weight if norm.form == "offset" else weight)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: RmsNorm, *, after: RmsNorm | None = None
) -> tuple[Tensor, Tensor]:
    """``residual + x`` (of x's norm, with `after`), and the norm of that sum."""
    total = residual + (x if after is None else rms_norm(x, after))
    return total, rms_norm(total, norm)
