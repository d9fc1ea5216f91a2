"""Packing and unpacking of 4-bit codes.

Codes lie two to a byte, the first usually in the high nibble. To unpack, two bytes are read as one 16-bit
index into a table whose entries hold the four decoded values: one gather of a wide element replaces the
shifts, masks and look-ups of four narrow ones, which is what makes plain torch fast enough here.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# An opaque element as wide as four values; gathers only move its bits.
_WIDE = {torch.float32: torch.complex128, torch.bfloat16: torch.complex64, torch.float16: torch.complex64}


@functools.lru_cache(maxsize=32)
def quad_table(
    levels: tuple[float, ...], dtype: torch.dtype, device: torch.device, *, low_first: bool = False
) -> Tensor:
    """Decoded values of every pair of bytes.

    Args:
        levels: the 16 values that the codes 0..15 stand for.
        dtype: fp32, bf16 or fp16, of the decoded values.
        device: where the table lives (1 MiB for fp32).
        low_first: whether a byte's low nibble holds its first code.

    Returns:
        [65536] of elements as wide as four values; entry ``i`` holds, in order, the values of the four codes
        of the two bytes whose memory reads as the unsigned 16-bit integer ``i``.
    """
    if len(levels) != 16:
        raise ValueError(f"levels: expected 16 values, got {len(levels)}")
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        byte = torch.arange(256, dtype=torch.uint8)
        pairs = torch.cartesian_prod(byte, byte)
        index = pairs.view(torch.uint16).flatten().long()
        high, low = pairs >> 4, pairs & 15
        codes = torch.stack((low, high) if low_first else (high, low), dim=2).view(-1, 4).long()
        table = torch.empty(65536, 4, dtype=dtype)
        table[index] = torch.tensor(levels, dtype=torch.float32).to(dtype)[codes]
        return table.view(_WIDE[dtype]).flatten().to(device)


def decode(packed: Tensor, levels: tuple[float, ...], out: Tensor, *, low_first: bool = False) -> Tensor:
    """Decode packed codes into ``out``.

    Args:
        packed: uint8 [..., n], n even; the last dimension contiguous, the others of any strides that are
            even.
        levels: the 16 values that the codes 0..15 stand for.
        out: fp32, bf16 or fp16, contiguous, two elements for each byte in the logical order of ``packed``;
            overwritten.
        low_first: whether a byte's low nibble holds its first code.

    Returns:
        ``out``.
    """
    if packed.storage_offset() % 2:  # cannot be read as 16-bit integers in place
        packed = packed.clone()
    pairs = packed.view(torch.uint16)
    index = torch.empty(pairs.shape, dtype=torch.int64, device=packed.device).copy_(pairs)
    # gather runs in parallel over its other dimensions only, so it is given one
    lanes = math.gcd(index.numel(), 64)
    table = quad_table(levels, out.dtype, out.device, low_first=low_first)
    wide = out.view(_WIDE[out.dtype]).view(lanes, -1)
    torch.gather(table.expand(lanes, -1), 1, index.view(lanes, -1), out=wide)
    return out


def encode(codes: Tensor) -> Tensor:
    """Pack codes 0..15, uint8 [2 * n], into uint8 [n], the first of a pair in the high nibble."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]
