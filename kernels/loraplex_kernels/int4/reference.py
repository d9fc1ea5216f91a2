"""Affine int4 in plain torch, on any device.

Each output row is cut along its width into groups; a group's 16 steps are ``(code - 8) * scale + zero``.
Scales and zeros are fp32 tensors whose values `quantize` chooses among those that bf16 can hold, so that the
packed CPU format, which stores bf16, represents exactly the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels._nibbles import decode, encode, scratch
from loraplex_kernels.dense import Tile, assemble, linear_by_tiles

GROUPS = (128, 64, 32)
"""Group sizes, the preferred one first."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STEPS: tuple[float, ...] = tuple(float(code - 8) for code in range(16))
"""What the codes 0..15 stand for, in units of the scale above the zero."""
# Elements quantised at once: bounds the temporaries to a few MiB.
_CHUNK = 1 << 18
# fp32 elements of a dequantised tile: on a CPU it must stay in the cache between the look-up and the product.
_CPU_TILE = 1 << 20
_GPU_TILE = 1 << 24


@dataclass(frozen=True, eq=False)
class Int4Weight:
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

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this weight."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for checksums and memory accounts."""
        return {"packed": self.packed, "scale": self.scale, "zero": self.zero}

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same weight on another device."""
        return Int4Weight(
            self.packed.to(device), self.scale.to(device), self.zero.to(device), self.shape, self.group
        )


def choose_group(width: int) -> int:
    """The largest group that divides an input width.

    Raises:
        ValueError: if the width is no multiple of 32.
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
    rows: beyond the result, temporaries stay at a few MiB whatever the size.

    Args:
        weight: fp32, fp16 or bf16 [N, K], on any device; not modified.
        group: 128, 64 or 32, dividing K; default: the largest that does.

    Raises:
        ValueError: for a weight that is no floating-point matrix, is empty, whose width no group divides, or
            that holds inf or NaN.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected a non-empty matrix [N, K], got shape {list(weight.shape)}")
    if weight.dtype not in _FLOATS:
        raise ValueError(f"weight: expected float32, float16 or bfloat16, got {weight.dtype}; cast it first")
    weight = weight.detach()
    n, k = weight.shape
    if group is None:
        group = choose_group(k)
    elif group not in GROUPS or k % group:
        raise ValueError(f"group: expected one of {GROUPS} that divides the width {k}, got {group}")
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, k // group, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    step = max(_CHUNK // k, 1)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        codes, scale[rows], zero[rows] = _quantize_groups(weight[rows].float().view(-1, k // group, group))
        packed[rows] = encode(codes.view(-1)).view(-1, k // 2)
    if not bool((scale.isfinite() & zero.isfinite()).all()):
        raise ValueError("weight: holds inf, NaN or values beyond bf16's range; check the checkpoint")
    return Int4Weight(packed, scale, zero, (n, k), group)


def dequantize(w: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight, [N, K] in ``dtype`` (values are computed in fp32 and rounded once)."""
    return assemble(w.shape, _tiles(w), dtype, w.device)


def matmul(x: Tensor, w: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ dequantize(w).T + bias`` with one cache-sized tile of the weight dense at a time. Inference only.

    Args:
        x: [..., K], fp32, fp16 or bf16, on the weight's device. On a CPU products and sums are fp32 whatever
            the dtype; elsewhere tiles are cast to x's dtype and accumulated in fp32 by the matrix unit.
        w: weight of shape (N, K).
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: if x's last dimension is not K.
    """
    return linear_by_tiles(x, w.shape, _tiles(w), bias)


def _quantize_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8, scale and zero fp32 [rows, num_groups] of fp32 [rows, num_groups, group]."""
    low, high = groups.aminmax(dim=2)
    zero = (low + (high - low) * (8 / 15)).bfloat16().float()
    scale = _round_up_to_bf16(torch.maximum((high - zero) / 7, (zero - low) / 8))
    step = torch.where(scale > 0, scale, 1)[..., None]
    codes = ((groups - zero[..., None]) / step).round_().clamp_(-8, 7).add_(8)
    return codes.to(torch.uint8), scale, zero


def _round_up_to_bf16(values: Tensor) -> Tensor:
    """The smallest bf16 number that is no less, as fp32; values are not negative."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _tiles(w: Int4Weight) -> Iterator[Tile]:
    """Dense tiles (first row, one past the last, fp32 [rows, K]) in order; each overwrites the one before."""
    n, k = w.shape
    step = min(max((_CPU_TILE if w.device.type == "cpu" else _GPU_TILE) // k, 1), n)
    buffer = scratch("tile", step * k, torch.float32, w.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = decode(w.packed[start:stop].reshape(-1), STEPS, buffer[: (stop - start) * k])
        # Product and sum are rounded apart: a fused multiply-add would give other bits on other devices.
        groups = values.view(stop - start, -1, w.group)
        groups.mul_(w.scale[start:stop, :, None]).add_(w.zero[start:stop, :, None])
        yield start, stop, values.view(-1, k)
