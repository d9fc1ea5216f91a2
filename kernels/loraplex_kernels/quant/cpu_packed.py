"""Affine int4 on torch's packed CPU kernel.

The kernel takes bf16 activations and wins while there are few rows. With more rows it is faster to decode the
same packed buffer tile by tile and use a dense product, so the weight exists once, in the kernel's own
layout. That layout is not documented: it is checked at first use on a small matrix, and if it is not the
expected one, the packed kernel serves every number of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.dense import linear
from loraplex_kernels.quant.int4 import GROUPS, STEPS, Int4Weight
from loraplex_kernels.quant.nibbles import decode, scratch

# Output rows in one block of the kernel's layout, with AVX-512 and with AVX2.
_BLOCKS = (64, 32)
# Rows repacked at once: a multiple of every block; bounds the temporaries (int32 codes).
_ROWS_PER_REPACK = 64
# Elements of a decoded tile, which must stay in the cache between the look-up and the product.
_TILE = 1 << 19
# From this many rows, and for weights of at least this many elements, decoding and a dense product beat the
# packed kernel; by the dtype of the tiles. Measured on one thread (bf16: Zen 5; fp32: AVX-512 without bf16).
_TILED_FROM_ROWS = {torch.bfloat16: 128, torch.float32: 64}
_TILED_FROM_ELEMENTS = 1 << 19


@dataclass(frozen=True, eq=False)
class PackedInt4Weight:
    """A linear layer's weight in the layout of torch's packed int4 CPU kernel.

    Attributes:
        packed: uint8 [N, K / 2], in the kernel's blocked layout.
        scale_and_zero: bf16 [K / group, N, 2].
        shape: (N, K) = (output width, input width).
        group: elements along K that share a scale: 128, 64 or 32.
    """

    packed: Tensor
    scale_and_zero: Tensor
    shape: tuple[int, int]
    group: int

    @staticmethod
    def from_int4(w: Int4Weight) -> PackedInt4Weight:
        """Repack a weight. Scales and zeros are rounded to bf16; those that `quantize` chose need no
        rounding.

        Raises:
            ValueError: if the weight is not on a CPU or not `supported`.
        """
        if w.device.type != "cpu" or not supported(w.shape, w.group):
            raise ValueError(
                f"shape: the packed CPU kernel takes output widths that are multiples of 16, got {w.shape} "
                f"in groups of {w.group} on {w.device}; use loraplex_kernels.quant.int4.matmul"
            )
        n, k = w.shape
        packed = torch.empty(n, k // 2, dtype=torch.uint8)
        for start in range(0, n, _ROWS_PER_REPACK):
            rows = slice(start, start + _ROWS_PER_REPACK)
            codes = torch.stack((w.packed[rows] >> 4, w.packed[rows] & 15), dim=2)
            packed[rows] = _pack(codes.view(-1, k))
        scale_and_zero = torch.stack((w.scale.t(), w.zero.t()), dim=2).bfloat16()
        return PackedInt4Weight(packed, scale_and_zero, w.shape, w.group)

    @property
    def device(self) -> torch.device:
        """The device of the codes: a CPU."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this weight."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for checksums and memory accounts."""
        return {"packed": self.packed, "scale_and_zero": self.scale_and_zero}


def supported(shape: tuple[int, int], group: int) -> bool:
    """True if torch's packed CPU kernel takes a weight of ``shape`` = (N, K) in groups of ``group``."""
    n, k = shape
    return (
        hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and group in GROUPS
        and min(n, k) > 0
        and n % 16 == 0
        and k % group == 0
    )


def matmul(x: Tensor, w: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ dequantize(w).T + bias`` with activations rounded to bf16 for the product. Inference only.

    Sums are fp32. With few rows the product itself is rounded to bf16; with many, on a processor without bf16
    dot products, nothing is rounded and all is fp32.

    Args:
        x: [..., K], fp32, fp16 or bf16, on the CPU.
        w: weight of shape (N, K).
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: if x's last dimension is not K.
    """
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension is {x.shape[-1]}, the weight's input width is {k}")
    rows = x.reshape(-1, k)
    tiled = rows.shape[0] >= _TILED_FROM_ROWS[tile_dtype()] and n * k >= _TILED_FROM_ELEMENTS
    if tiled and layout_block() is not None:
        product = matmul_tiled(rows, w)
    else:
        product = matmul_packed(rows, w)
    product = product.to(x.dtype)
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], n)


def matmul_packed(rows: Tensor, w: PackedInt4Weight) -> Tensor:
    """The product on the packed kernel: [M, K] of any float dtype → bf16 [M, N]."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows.bfloat16(), w.packed, w.group, w.scale_and_zero
    )
    return product


def matmul_tiled(rows: Tensor, w: PackedInt4Weight) -> Tensor:
    """The product by decoded tiles: [M, K] of any float dtype → [M, N] in `tile_dtype`.

    Raises:
        RuntimeError: if `layout_block` does not know the kernel's layout.
    """
    block = layout_block()
    if block is None:
        raise RuntimeError("the layout of torch's packed int4 kernel is not the expected one")
    dtype = tile_dtype()
    rows = rows.to(dtype)
    out = torch.empty(rows.shape[0], w.shape[0], dtype=dtype)
    for start, stop, tile, width in _tiles(w, block, dtype):
        out[:, start:stop] = _rows_in_order(linear(rows, tile.t()), width)
    return out


def dequantize(w: PackedInt4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight, [N, K] in ``dtype``, for tests and checks.

    Raises:
        RuntimeError: if `layout_block` does not know the kernel's layout.
    """
    block = layout_block()
    if block is None:
        raise RuntimeError("the layout of torch's packed int4 kernel is not the expected one")
    return _unpack(w, block).to(dtype)


@functools.cache
def tile_dtype() -> torch.dtype:
    """Dtype of decoded tiles: bf16 where the processor multiplies it natively, else fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, name, bool)() for name in probes)
    return torch.bfloat16 if native else torch.float32


@functools.cache
def layout_block() -> int | None:
    """Rows in a block of the kernel's layout on this processor, or None if the layout is an unknown one."""
    with torch.inference_mode(False):
        n, k = 112, 32  # whole blocks and a partial one, for either block
        codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(0))
        unit = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(1, n, 2)
        w = PackedInt4Weight(_pack(codes), unit, (n, k), k)
        for block in _BLOCKS:
            if torch.equal(_unpack(w, block), codes - 8.0):
                return block
    return None


def _pack(codes: Tensor) -> Tensor:
    """Codes 0..15 [N, K] in the kernel's layout, uint8 [N, K / 2]. Blocks of rows do not depend on each
    other."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


def _unpack(w: PackedInt4Weight, block: int) -> Tensor:
    """The dense weight, fp32 [N, K], taking the layout to have blocks of ``block`` rows."""
    out = torch.empty(w.shape, dtype=torch.float32)
    for start, stop, tile, width in _tiles(w, block, torch.float32):
        out[start:stop] = _rows_in_order(tile, width).t()
    return out


def _tiles(
    w: PackedInt4Weight, block: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, int | None]]:
    """Dense tiles in order; each overwrites the one before.

    A block of the layout holds, for each k, the codes of its rows side by side. Byte ``i`` of a whole block
    has row ``i`` in its low nibble and row ``i + block / 2`` in the high one; byte ``i`` of the partial last
    block has the rows ``2 i`` and ``2 i + 1``.

    Yields:
        (first row, one past the last, tile, width): the tile is [K, rows] in ``dtype``, its columns as
        decoded; `_rows_in_order` with ``width`` puts them in the order of rows.
    """
    n, k = w.shape
    whole = n - n % block
    step = max(_TILE // (k * block), 1) * block
    buffer = scratch("tile", min(step, n) * k, dtype, w.device)
    spans = [(start, min(start + step, whole), block) for start in range(0, whole, step)]
    if whole < n:
        spans.append((whole, n, n - whole))
    for start, stop, rows in spans:
        width = block if rows == block else None
        # [blocks, K, block / 2] -> [K, blocks, block / 2]: one wide product instead of one for each block
        codes = w.packed.view(-1)[start * k // 2 : stop * k // 2].view(-1, k, rows // 2).transpose(0, 1)
        values = decode(codes, STEPS, buffer[: (stop - start) * k], low_first=True)
        affine = w.scale_and_zero[:, start:stop].permute(2, 0, 1)
        scale, zero = _columns_as_decoded(affine, width).to(dtype).unsqueeze(2)
        groups = values.view(k // w.group, w.group, stop - start)
        yield start, stop, torch.addcmul(zero, groups, scale, out=groups).view(k, -1), width


def _rows_in_order(values: Tensor, width: int | None) -> Tensor:
    """Last dimension from decoded order to that of rows; ``width`` is a whole block's, None for the tail."""
    if width is None:
        return values
    pairs = values.view(*values.shape[:-1], -1, width // 2, 2)
    return pairs.transpose(-1, -2).flatten(-3)


def _columns_as_decoded(values: Tensor, width: int | None) -> Tensor:
    """The inverse of `_rows_in_order`, contiguous."""
    if width is None:
        return values.contiguous()
    halves = values.reshape(*values.shape[:-1], -1, 2, width // 2)
    return halves.transpose(-1, -2).flatten(-3).contiguous()
