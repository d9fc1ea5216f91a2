"""The 4-bit formats in plain torch, on any device: what `nf4` and `int4` share.

A format decodes its weight to dense float32 tiles, one after the other; the dense weight and the product are
made of those. Tiles are small enough to stay in the cache, so a product needs no dense copy of the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.dense import Tile, assemble, linear_by_tiles

CHUNK = 1 << 18
"""Elements quantised at once: bounds the temporaries to a few MiB."""

CPU_TILE = 1 << 20
"""Elements of a decoded tile on a CPU: 4 MiB stay in the cache between the look-up and the product."""

GPU_TILE = 1 << 24
"""The same elsewhere, where launches count for more: 64 MiB."""


class QuantWeight(ABC):
    """A linear layer's weight in 4 bits, of `shape` (N, K) = (output width, input width).

    `packed` holds the codes, uint8, two to a byte.
    """

    packed: Tensor
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this weight."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for checksums and memory accounts."""

    @abstractmethod
    def tiles(self) -> Iterator[Tile]:
        """Dense tiles, fp32 [rows, K], in order of their rows; each overwrites the one before."""

    def rows_per_tile(self, align: int = 1) -> int:
        """Rows of a tile, a multiple of `align` unless the weight has fewer."""
        n, k = self.shape
        rows = (CPU_TILE if self.device.type == "cpu" else GPU_TILE) // k
        return min(max(rows // align, 1) * align, n)


def dequantize(w: QuantWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight, [N, K] in ``dtype`` (values are computed in fp32 and rounded once)."""
    return assemble(w.shape, w.tiles(), dtype, w.device)


def matmul(x: Tensor, w: QuantWeight, bias: Tensor | None = None) -> Tensor:
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
    return linear_by_tiles(x, w.shape, w.tiles(), bias)


def check_matrix(weight: Tensor) -> None:
    """Raise `ValueError` unless `weight` is a matrix [N, K], not empty, in fp32, fp16 or bf16."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected a non-empty matrix [N, K], got shape {list(weight.shape)}")
    if weight.dtype not in dispatch.FLOATS:
        raise ValueError(f"weight: expected float32, float16 or bfloat16, got {weight.dtype}; cast it first")
