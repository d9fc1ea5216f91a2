"""Unpacking of 4-bit codes through a table of byte pairs.

Codes lie two to a byte, the even element in the high nibble. Two bytes are one 16-bit index into a table whose
entries hold the four decoded values, so that one gather of a wide element replaces four shifts, masks and look-ups.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# The widest element that torch can gather: its 16 bytes hold four decoded fp32 values.
_QUAD = torch.complex128


@functools.lru_cache(maxsize=32)
def quad_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Decoded values of every byte pair.

    Args:
        levels: the 16 values that the codes 0..15 stand for.
        device: where the table lives (1 MiB).

    Returns:
        complex128 [65536]; viewed as fp32 [65536, 4], row ``i`` holds the four values of the two bytes that read as
        the little-endian (or native) unsigned 16-bit integer ``i``.
    """
    if len(levels) != 16:
        raise ValueError(f"levels: expected 16 values, got {len(levels)}")
    with torch.inference_mode(False), torch.no_grad():  # a cached inference tensor could not be used in training
        byte = torch.arange(256, dtype=torch.uint8)
        pair = torch.stack((byte.repeat(256), byte.repeat_interleave(256)), dim=1)
        order = _unsigned(pair.view(torch.int16).flatten())
        codes = torch.stack((pair[:, 0] >> 4, pair[:, 0] & 15, pair[:, 1] >> 4, pair[:, 1] & 15), dim=1)
        table = torch.empty(65536, 4)
        table[order.long()] = torch.tensor(levels, dtype=torch.float32)[codes.long()]
        return table.view(_QUAD).flatten().to(device)


def decode(packed: Tensor, levels: Sequence[float]) -> Tensor:
    """Decode packed codes to fp32.

    Args:
        packed: uint8 [n], contiguous; the storage may be a slice of a larger one.
        levels: the 16 values that the codes 0..15 stand for.

    Returns:
        fp32 [2 * n], newly allocated.
    """
    table = quad_table(tuple(levels), packed.device)
    num_bytes = packed.numel()
    if num_bytes % 2 or packed.storage_offset() % 2:
        even = packed.new_zeros(num_bytes + num_bytes % 2)
        even[:num_bytes] = packed
        packed = even
    index = _unsigned(packed.view(torch.int16))
    return torch.index_select(table, 0, index).view(torch.float32)[: 2 * num_bytes]


def encode(codes: Tensor) -> Tensor:
    """Pack codes 0..15, uint8 [2 * n], into uint8 [n]: the even element goes to the high nibble."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _unsigned(index: Tensor) -> Tensor:
    """int16 bit patterns as int32 0..65535 (the bits, so that no wrap-around is left to convention)."""
    return index.to(torch.int32).bitwise_and_(0xFFFF)
