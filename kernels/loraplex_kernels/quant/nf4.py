"""NF4 in plain torch, on any device.

Weights are cut into blocks of 64 consecutive elements of the flattened matrix (also where its width is no
multiple of 64), scaled by the block's largest magnitude and rounded to one of 16 levels. Packed bytes and
block scales equal those of bitsandbytes, so that either may read what the other wrote. With double
quantisation the block scales are 8-bit codes themselves, in blocks of 256.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.dense import Tile
from loraplex_kernels.quant import reference
from loraplex_kernels.quant.nibbles import decode, encode, scratch
from loraplex_kernels.quant.reference import QuantWeight, check_matrix, dequantize, matmul

__all__ = ["NESTED_BLOCK", "NF4_LEVELS", "NestedAbsmax", "Nf4Weight", "dequantize", "matmul", "quantize"]

# Quantiles of the standard normal, scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, appendix E).
_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_LEVELS: Tensor = torch.tensor(_LEVELS, dtype=torch.float32)
"""The 16 values of NF4, fp32 [16], ascending."""

# Midpoints between neighbouring levels.
_BOUNDS: tuple[float, ...] = tuple(((NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2).tolist())

NESTED_BLOCK = 256
"""Number of block scales that share a second scale in double quantisation, as in bitsandbytes."""

_GRID = 32767.5
"""Half the steps of the grid to which bitsandbytes' CPU code rounds first."""


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """Double-quantised block scales.

    Attributes:
        codes: uint8 [num_blocks], indices into ``levels``.
        absmax: fp32 [ceil(num_blocks / 256)], the scale of each 256 codes.
        levels: fp32 [256], ascending.
        offset: fp32 scalar tensor, the mean that was subtracted before quantising.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    offset: Tensor

    def slice(self, start: int, stop: int) -> Tensor:
        """Block scales ``start:stop``, fp32 [stop - start]."""
        nested = self.absmax[start // NESTED_BLOCK : -(-stop // NESTED_BLOCK)]
        scale = nested.repeat_interleave(NESTED_BLOCK)
        skip = start % NESTED_BLOCK
        levels = torch.index_select(self.levels, 0, self.codes[start:stop].to(torch.int32))
        return levels.mul_(scale[skip : skip + stop - start]).add_(self.offset)

    def to(self, device: torch.device | str) -> NestedAbsmax:
        """The same scales on another device."""
        return NestedAbsmax(
            self.codes.to(device), self.absmax.to(device), self.levels.to(device), self.offset.to(device)
        )


@dataclass(frozen=True, eq=False)
class Nf4Weight(QuantWeight):
    """A linear layer's weight in NF4.

    Attributes:
        packed: uint8 [ceil(N * K / 2)], two codes a byte, the even element in the high nibble.
        absmax: block scales, fp32 [num_blocks], or double-quantised.
        shape: (N, K) = (output width, input width).
        block_size: elements of the flattened matrix that share a scale.
    """

    packed: Tensor
    absmax: Tensor | NestedAbsmax
    shape: tuple[int, int]
    block_size: int = 64

    def __post_init__(self) -> None:
        n, k = self.shape
        num_bytes = -(-n * k // 2)
        if self.packed.dtype != torch.uint8 or self.packed.shape != (num_bytes,):
            raise ValueError(
                f"packed: expected uint8 [{num_bytes}] for a weight of {n} x {k}, got {self.packed.dtype} "
                f"{list(self.packed.shape)}; flatten the packed tensor and check the shape"
            )
        blocks = self.absmax.codes if isinstance(self.absmax, NestedAbsmax) else self.absmax
        if blocks.shape != (self.num_blocks,):
            raise ValueError(
                f"absmax: expected [{self.num_blocks}] for a weight of {n} x {k} in blocks of "
                f"{self.block_size}, got {list(blocks.shape)}; check block_size"
            )

    @property
    def num_blocks(self) -> int:
        """Number of blocks that share a scale; the last may be partial."""
        return -(-self.shape[0] * self.shape[1] // self.block_size)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for checksums and memory accounts."""
        if isinstance(self.absmax, NestedAbsmax):
            return {
                "packed": self.packed,
                "absmax.codes": self.absmax.codes,
                "absmax.absmax": self.absmax.absmax,
                "absmax.levels": self.absmax.levels,
                "absmax.offset": self.absmax.offset,
            }
        return {"packed": self.packed, "absmax": self.absmax}

    def block_absmax(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Scales of the blocks ``start:stop``, fp32."""
        stop = self.num_blocks if stop is None else stop
        if isinstance(self.absmax, NestedAbsmax):
            return self.absmax.slice(start, stop)
        return self.absmax[start:stop]

    def to(self, device: torch.device | str) -> Nf4Weight:
        """The same weight on another device."""
        return Nf4Weight(self.packed.to(device), self.absmax.to(device), self.shape, self.block_size)

    def tiles(self) -> Iterator[Tile]:
        """Dense tiles, fp32 [rows, K]; each begins where a block of the flattened matrix does."""
        n, k = self.shape
        block = self.block_size
        step = self.rows_per_tile(align=block // math.gcd(k, block))
        buffer = scratch("tile", -(-step * k // block) * block, torch.float32, self.device)
        for start in range(0, n, step):
            stop = min(start + step, n)
            first, last = start * k // block, -(-stop * k // block)
            packed = self.packed[first * block // 2 : last * block // 2]
            missing = (last - first) * block // 2 - packed.numel()
            if missing:
                packed = torch.nn.functional.pad(packed, (0, missing))
            values = decode(packed, _LEVELS, buffer[: (last - first) * block])
            values.view(-1, block).mul_(self.block_absmax(first, last)[:, None])
            yield Tile(start, stop, values[: (stop - start) * k].view(-1, k))


def quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = False) -> Nf4Weight:
    """Quantise a weight to NF4.

    Works through the weight in chunks: beyond the result, temporaries stay at a few MiB for any size.

    Args:
        weight: fp32, fp16 or bf16 [N, K], on any device; not modified.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        double_quant: store the scales as 8-bit codes (0.5 → 0.127 bits per weight).

    Raises:
        ValueError: for a weight that is not a floating-point matrix, is empty, or holds inf or NaN.
    """
    check_matrix(weight)
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"block_size: expected a power of two from 32 to 4096, got {block_size}")
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, numel, reference.CHUNK):
        stop = min(start + reference.CHUNK, numel)
        codes, scales = _quantize_blocks(flat[start:stop].float(), block_size)
        packed[start // 2 : -(-stop // 2)] = encode(codes)
        absmax[start // block_size : -(-stop // block_size)] = scales
    if not bool(absmax.isfinite().all()):
        raise ValueError("weight: holds inf or NaN, which NF4 cannot represent; check the checkpoint")
    scales_or_nested: Tensor | NestedAbsmax = _nest(absmax) if double_quant else absmax
    return Nf4Weight(packed, scales_or_nested, (weight.shape[0], weight.shape[1]), block_size)


def _quantize_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [numel, rounded up to even] and scales fp32 [num_blocks]; the last block may be partial.

    A full block is multiplied by the reciprocal of its scale, the partial last one divided by it: the two
    differ in the last bit, and bitsandbytes' bytes depend on it.
    """
    tail = flat.numel() % block_size
    blocks = flat[: flat.numel() - tail].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else flat.new_empty(0)
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal_()[:, None]).view(-1)
    if tail:
        last = flat[-tail:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat((absmax, last[None]))
        scaled = torch.cat((scaled, flat[-tail:] / last, flat.new_zeros(tail % 2)))
    scaled.clamp_(-1, 1)
    codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    for bound in _BOUNDS:  # three times as fast as a binary search for each element
        codes += scaled > bound
    return codes, absmax


# --- double quantisation


@functools.lru_cache(maxsize=1)
def _dynamic_levels() -> Tensor:
    """The signed 8-bit dynamic data type (Dettmers, 2015, arXiv:1511.04561), fp32 [256], ascending.

    Seven decades; the decade ``d`` (from 10⁻⁶ to 1) is cut into 2ᵈ equal parts between a tenth and the whole
    of it, whose middles are the levels, with either sign; then 0 and 1.
    """
    with torch.inference_mode(False):
        levels = [0.0, 1.0]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
            middles = (edges[:-1] + edges[1:]) / 2
            for sign in (1, -1):
                levels += (sign * 10 ** (decade - 6) * middles).tolist()
        return torch.tensor(sorted(levels), dtype=torch.float32)


def _nest(absmax: Tensor) -> NestedAbsmax:
    """Quantise block scales to 8 bits around their mean."""
    levels = _dynamic_levels().to(absmax.device)
    offset = absmax.mean()
    centred = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK))
    blocks = centred.view(-1, NESTED_BLOCK)
    scale = blocks.abs().amax(dim=1)
    scaled = (blocks * scale.clamp(min=1e-38).reciprocal_()[:, None]).clamp_(-1, 1)
    if absmax.device.type == "cpu":
        # bitsandbytes' CPU code first rounds to the nearest of 65,536 even steps, and so does this.
        scaled = scaled.add_(1).mul_(_GRID).add_(0.5).floor_().div_(_GRID).sub_(1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    codes[scale == 0] = 0
    return NestedAbsmax(codes.view(-1)[: absmax.numel()], scale, levels, offset)
