"""Dense products on the library that is faster on a CPU.

For fp32, torch calls MKL, which does not use AVX-512 on processors that are not Intel's. oneDNN, which torch
includes for its other dtypes, is about twice as fast there from a few rows on, and not slower elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# oneDNN's calls cost about 10 µs more than MKL's, and its matrix-vector products are not faster: the measured
# crossover.
_MIN_ROWS = 3
_MIN_PRODUCTS = 1_500_000
# oneDNN compiles code for each shape and keeps it, some 0.6 MB each. A server sees any number of rows, so
# they are rounded up: to a multiple of an eighth of the next power of two, at least 8.
_MIN_STEP = 8


class Tile(NamedTuple):
    """A part of a weight: its first row, one past the last, and the dense rows [rows, K]."""

    start: int
    stop: int
    rows: Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as `torch.nn.functional.linear`. Inference only.

    Args:
        x: [..., K].
        weight: [N, K], any strides, dtype and device of x.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    if x.device.type != "cpu" or x.numel() < _MIN_ROWS * x.shape[-1]:
        return torch.nn.functional.linear(x, weight, bias)
    if x.dtype == torch.float32:
        if x.numel() * weight.shape[0] < _MIN_PRODUCTS or not _has_onednn():
            return torch.nn.functional.linear(x, weight, bias)
        return _in_few_shapes(_onednn, x, weight, bias)
    # In half precision torch calls oneDNN itself.
    return _in_few_shapes(torch.nn.functional.linear, x, weight, bias)


def linear_by_tiles(
    x: Tensor, shape: tuple[int, int], tiles: Iterable[Tile], bias: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias`` for a weight of `shape` (N, K) that comes tile by tile, in order of its rows.

    On a CPU products and sums are fp32 whatever x's dtype; elsewhere tiles are cast to it and the matrix unit
    accumulates in fp32. Each tile is consumed before the next is requested. Returns [..., N] in x's dtype.

    Raises:
        ValueError: if x's last dimension is not K.
    """
    n, k = shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension is {x.shape[-1]}, the weight's input width is {k}")
    compute = torch.float32 if x.device.type == "cpu" else x.dtype
    rows = x.reshape(-1, k).to(compute)
    columns = [
        linear(rows, tile.to(compute), None if bias is None else bias[start:stop].to(compute))
        for start, stop, tile in tiles
    ]
    out = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    return out.to(x.dtype).view(*x.shape[:-1], n)


def assemble(
    shape: tuple[int, int], tiles: Iterable[Tile], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The whole weight of `shape` in `dtype`, from its tiles."""
    out = torch.empty(shape, dtype=dtype, device=device)
    for start, stop, tile in tiles:
        out[start:stop] = tile
    return out


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _in_few_shapes(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``product(x, weight, bias)`` with x's rows padded, so that few shapes are ever compiled."""
    rows = x.numel() // x.shape[-1]
    padded = padded_rows(rows)
    if padded == rows:
        return product(x, weight, bias)
    flat = x.new_zeros(padded, x.shape[-1])
    flat[:rows] = x.reshape(rows, -1)
    return product(flat, weight, bias)[:rows].view(*x.shape[:-1], -1)


def padded_rows(rows: int) -> int:
    """The number of rows that a product of `rows` rows is computed with."""
    step = max(_MIN_STEP, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


@functools.cache
def _has_onednn() -> bool:
    # the op exists only in builds of torch with oneDNN
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")
