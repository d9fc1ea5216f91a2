"""Packing and unpacking of 4-bit codes.

Codes lie two to a byte, the first usually in the high nibble. To unpack, a byte is the index into a table
whose entries hold the two decoded values: one gather of a wide element replaces the shifts, masks and
look-ups of two narrow ones. The table of a byte (2 KiB) stays in the first-level cache; one of two bytes
would be fewer gathers, but slower unless nothing else uses the second level.
"""

from __future__ import annotations

import functools
import math
import threading

import torch
from torch import Tensor

# An opaque element as wide as two values; gathers only move its bits.
_WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}

_thread = threading.local()


@functools.lru_cache(maxsize=32)
def pair_table(
    levels: tuple[float, ...], dtype: torch.dtype, device: torch.device, *, low_first: bool = False
) -> Tensor:
    """Decoded values of every byte.

    Args:
        levels: the 16 values that the codes 0..15 stand for.
        dtype: fp32, bf16 or fp16, of the decoded values.
        device: where the table lives.
        low_first: whether a byte's low nibble holds its first code.

    Returns:
        [256] of elements as wide as two values; viewed as ``dtype`` [256, 2], row ``i`` holds the values of
        the two codes in byte ``i``.
    """
    if len(levels) != 16:
        raise ValueError(f"levels: expected 16 values, got {len(levels)}")
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        byte = torch.arange(256)
        high, low = byte >> 4, byte & 15
        codes = torch.stack((low, high) if low_first else (high, low), dim=1)
        values = torch.tensor(levels, dtype=torch.float32).to(dtype)[codes]
        return values.view(_WIDE[dtype]).flatten().to(device)


def decode(packed: Tensor, levels: tuple[float, ...], out: Tensor, *, low_first: bool = False) -> Tensor:
    """Decode packed codes into ``out``.

    Args:
        packed: uint8, any shape and strides.
        levels: the 16 values that the codes 0..15 stand for.
        out: fp32, bf16 or fp16, contiguous, two elements for each byte in the logical order of ``packed``;
            overwritten.
        low_first: whether a byte's low nibble holds its first code.

    Returns:
        ``out``.
    """
    table = pair_table(levels, out.dtype, out.device, low_first=low_first)
    wide = out.view(_WIDE[out.dtype]).flatten()
    if packed.device.type == "cpu" and torch.get_num_threads() > 1:
        # index_select runs on one thread; gather divides its other dimensions among all, so it is given one
        index = scratch("index", packed.numel(), torch.int64, packed.device).view(packed.shape).copy_(packed)
        lanes = math.gcd(index.numel(), 64)
        torch.gather(table.expand(lanes, -1), 1, index.view(lanes, -1), out=wide.view(lanes, -1))
    else:
        index = scratch("index", packed.numel(), torch.int32, packed.device).view(packed.shape).copy_(packed)
        torch.index_select(table, 0, index.flatten(), out=wide)
    return out


def scratch(name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory that the next call with the same name on this thread hands out again.

    On a CPU the memory is kept: fresh pages would cost as much as what is written on them. Elsewhere torch's
    allocator keeps it anyway.
    """
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    kept: dict[tuple[str, torch.dtype], Tensor] = _thread.__dict__.setdefault("kept", {})
    buffer = kept.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        with torch.inference_mode(False):
            buffer = kept[name, dtype] = torch.empty(numel, dtype=dtype)
    return buffer[:numel]


def encode(codes: Tensor) -> Tensor:
    """Pack codes 0..15, uint8 [2 * n], into uint8 [n], the first of a pair in the high nibble."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]
