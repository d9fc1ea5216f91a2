"""Affine int4 in plain torch, on any device.

Each output row is cut along its width into groups; a group's 16 steps are ``(code - 8) * scale + zero``.
Scales and zeros are fp32 tensors whose values `quantize` chooses among those that bf16 can hold, so that the
packed CPU format, which stores bf16, represents exactly the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.dense import Tile
from loraplex_kernels.quant import reference
from loraplex_kernels.quant.nibbles import decode, encode, scratch
from loraplex_kernels.quant.reference import QuantWeight, check_matrix, dequantize, matmul

__all__ = ["GROUPS", "STEPS", "Int4Weight", "choose_group", "dequantize", "matmul", "quantize"]

GROUPS = (128, 64, 32)
"""Group sizes, the preferred one first."""

STEPS: tuple[float, ...] = tuple(float(code - 8) for code in range(16))
"""Values of the codes 0..15, in units of the scale above the zero."""


@dataclass(frozen=True, eq=False)
class Int4Weight(QuantWeight):
    """A linear layer's weight in affine int4.

    Attributes:
        packed: uint8 [N, K / 2], two codes a byte, the even element in the high nibble.
        scale: fp32 [N, K / group], not negative.
        zero: fp32 [N, K / group], the value of code 8.
        shape: (N, K) = (output width, input width).
        group: elements along K that share a scale: 128, 64 or 32.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    shape: tuple[int, int]
    group: int

    def __post_init__(self) -> None:
        n, k = self.shape
        if self.group not in GROUPS or k % self.group:
            raise ValueError(f"group: expected one of {GROUPS} that divides the width {k}, got {self.group}")
        if self.packed.dtype != torch.uint8 or self.packed.shape != (n, k // 2):
            raise ValueError(
                f"packed: expected uint8 [{n}, {k // 2}] for a weight of {n} x {k}, got {self.packed.dtype} "
                f"{list(self.packed.shape)}"
            )
        for name, tensor in (("scale", self.scale), ("zero", self.zero)):
            if tensor.shape != (n, k // self.group):
                raise ValueError(
                    f"{name}: expected [{n}, {k // self.group}] for a weight of {n} x {k} in groups of "
                    f"{self.group}, got {list(tensor.shape)}"
                )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for checksums and memory accounts."""
        return {"packed": self.packed, "scale": self.scale, "zero": self.zero}

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same weight on another device."""
        return Int4Weight(
            self.packed.to(device), self.scale.to(device), self.zero.to(device), self.shape, self.group
        )

    def tiles(self) -> Iterator[Tile]:
        """Dense tiles, fp32 [rows, K]."""
        n, k = self.shape
        step = self.rows_per_tile()
        buffer = scratch("tile", step * k, torch.float32, self.device)
        for start in range(0, n, step):
            stop = min(start + step, n)
            values = decode(self.packed[start:stop].reshape(-1), STEPS, buffer[: (stop - start) * k])
            # Product and sum are rounded apart: a fused multiply-add would give other bits on other devices.
            groups = values.view(stop - start, -1, self.group)
            groups.mul_(self.scale[start:stop, :, None]).add_(self.zero[start:stop, :, None])
            yield Tile(start, stop, values.view(-1, k))


def choose_group(width: int) -> int:
    """The largest group that divides an input width.

    Raises:
        ValueError: if the width is not a multiple of 32.
    """
    for group in GROUPS:
        if width > 0 and width % group == 0:
            return group
    raise ValueError(
        f"width: int4 needs an input width that is a multiple of 32, got {width}; "
        "use --quantization nf4 or none"
    )


def quantize(weight: Tensor, *, group: int | None = None) -> Int4Weight:
    """Quantise a weight to affine int4, rounding to nearest.

    Every element is off by at most half a step of its group (up to fp32 rounding): the step is rounded up to
    bf16 and covers the group's range also after the zero's rounding. Works through the weight in chunks of
    rows: beyond the result, temporaries stay at a few MiB for any size.

    Args:
        weight: fp32, fp16 or bf16 [N, K], on any device; not modified.
        group: 128, 64 or 32, dividing K; default: the largest that does.

    Raises:
        ValueError: for a weight that is no floating-point matrix, is empty, whose width no group divides, or
            that holds inf or NaN.
    """
    check_matrix(weight)
    weight = weight.detach()
    n, k = weight.shape
    if group is None:
        group = choose_group(k)
    elif group not in GROUPS or k % group:
        raise ValueError(f"group: expected one of {GROUPS} that divides the width {k}, got {group}")
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, k // group, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    step = max(reference.CHUNK // k, 1)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        codes, scale[rows], zero[rows] = _quantize_groups(weight[rows].float().view(-1, k // group, group))
        packed[rows] = encode(codes.view(-1)).view(-1, k // 2)
    if not bool((scale.isfinite() & zero.isfinite()).all()):
        raise ValueError("weight: holds inf, NaN or values beyond bf16's range; check the checkpoint")
    return Int4Weight(packed, scale, zero, (n, k), group)


class _Codes(NamedTuple):
    """Quantised groups: codes uint8 [rows, num_groups, group], scale and zero fp32 [rows, num_groups]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def _quantize_groups(groups: Tensor) -> _Codes:
    """The codes of fp32 groups [rows, num_groups, group]."""
    low, high = groups.aminmax(dim=2)
    zero = (low + (high - low) * (8 / 15)).bfloat16().float()
    scale = _round_up_to_bf16(torch.maximum((high - zero) / 7, (zero - low) / 8))
    step = torch.where(scale > 0, scale, 1)[..., None]
    codes = ((groups - zero[..., None]) / step).round_().clamp_(-8, 7).add_(8)
    return _Codes(codes.to(torch.uint8), scale, zero)


def _round_up_to_bf16(values: Tensor) -> Tensor:
    """Rounds values, none negative, up to the next bf16 number; returns fp32."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
