"""Frozen projection weights: one interface for all resident formats."""

from __future__ import annotations

import dataclasses
from typing import Protocol, cast

import torch

from loraplex_kernels import dense, dispatch, quant
from loraplex_kernels.quant import (
    BlockedWeight,
    Int4Weight,
    Nf4Weight,
    PackedInt4Weight,
    cpu_packed,
    int4,
    nf4,
)

_NF4_BLOCK = 64
_NESTED_BLOCK = 256
_NESTED_LEVELS_BYTES = 256 * 4


class FrozenWeight(Protocol):
    """y = x W^T + bias with W of `shape` (out, in)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in] to a new tensor [T, out] in x's dtype, accumulated in fp32; bias is [out]."""

    def dequantize(self) -> torch.Tensor:
        """The weight that the products use, fp32 [out, in]."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every resident tensor by name, for the checksum and the memory plan."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """An unquantised weight [out, in]."""

    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return dense.linear(x, self.weight, bias)

    def dequantize(self) -> torch.Tensor:
        return self.weight.float()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}


@dataclasses.dataclass(frozen=True, eq=False)
class Nf4:
    weight: Nf4Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nf4.matmul(x, self.weight, bias)

    def dequantize(self) -> torch.Tensor:
        return nf4.dequantize(self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weight.tensors()


@dataclasses.dataclass(frozen=True, eq=False)
class Int4:
    """Affine int4, dequantised in the activations' dtype."""

    weight: Int4Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int4.matmul(x, self.weight, bias)

    def dequantize(self) -> torch.Tensor:
        return int4.dequantize(self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weight.tensors()


@dataclasses.dataclass(frozen=True, eq=False)
class PackedInt4:
    """Affine int4 in the CPU's packed layout; products of few rows are in bf16."""

    weight: PackedInt4Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return cpu_packed.matmul(x, self.weight, bias)

    def dequantize(self) -> torch.Tensor:
        return cpu_packed.dequantize(self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weight.tensors()


@dataclasses.dataclass(frozen=True, eq=False)
class Blocked:
    """nf4 or int4 in the order in which the Triton kernels read it; sums are in fp32 and rounded once."""

    weight: BlockedWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return quant.matmul(x, self.weight, bias)

    def dequantize(self) -> torch.Tensor:
        return quant.dequantize(self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weight.tensors()


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """The format of the frozen projections in memory.

    Attributes:
        quantization: "nf4" (Dettmers et al., 2023), "int4" or "none".
        dtype: of the activations, and of unquantised weights.
        double_quant: quantise the scales of nf4 too.
        packed_int4: hold int4 in the CPU's packed layout (bf16 products) where the shape allows it.
    """

    quantization: str
    dtype: torch.dtype
    device: torch.device
    double_quant: bool = False
    packed_int4: bool = False

    def freeze(self, weights: list[torch.Tensor]) -> list[FrozenWeight]:
        """Converts sibling weights [out_i, in] to this format, joined along `out` where the format can.

        Raises:
            ValueError: the format cannot hold a weight: its width does not fit, or it contains inf or NaN.
        """
        if self.quantization == "none":
            dense = [weight.to(self.device, self.dtype) for weight in weights]
            return [Dense(dense[0].clone() if len(dense) == 1 else torch.cat(dense))]
        on_device = [weight.to(self.device) for weight in weights]
        if self.quantization == "nf4":
            return self._nf4(on_device)
        parts = [int4.quantize(weight) for weight in on_device]
        joined = Int4Weight(
            packed=torch.cat([part.packed for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero=torch.cat([part.zero for part in parts]),
            shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
            group=parts[0].group,
        )
        if dispatch.backend(self.device) == "triton":
            return [Blocked(quant.arrange_int4(joined))]
        if self.packed_int4 and cpu_packed.supported(joined.shape, joined.group):
            return [PackedInt4(PackedInt4Weight.from_int4(joined))]
        return [Int4(joined)]

    def planned_bytes(self, shapes: list[tuple[int, int]]) -> int:
        """Bytes that `freeze` will take for sibling weights of these shapes (out, in).

        Raises:
            ValueError: the format cannot hold weights of this width.
        """
        rows, width = sum(out for out, _ in shapes), shapes[0][1]
        if self.quantization == "none":
            return rows * width * self.dtype.itemsize
        blocked = dispatch.backend(self.device) == "triton"
        if self.quantization == "int4":
            group = int4.choose_group(width)
            # A scale and a zero: two bf16 where they are packed, else two float32.
            if blocked:
                blocks = -(-width // quant.BLOCK)
                groups = -(-blocks * quant.BLOCK // group)
                return blocks * rows * quant.BLOCK // 2 + groups * rows * 4
            packed = self.packed_int4 and cpu_packed.supported((rows, width), group)
            return rows * width // 2 + rows * (width // group) * (4 if packed else 8)
        return self._planned_nf4_bytes(shapes, blocked)

    def _planned_nf4_bytes(self, shapes: list[tuple[int, int]], blocked: bool) -> int:
        sizes = [out * width for out, width in shapes]
        blocks = [-(-size // _NF4_BLOCK) for size in sizes]
        codes = sum(-(-size // 2) for size in sizes)
        if not self.double_quant:
            return codes + 4 * sum(blocks)
        scales = 4 * sum(-(-count // _NESTED_BLOCK) for count in blocks)
        width = shapes[0][1]
        if not blocked or width % _NF4_BLOCK:
            return codes + sum(blocks) + scales + len(shapes) * (_NESTED_LEVELS_BYTES + 4)
        # One level table for each weight that is arranged alone, and one offset for each row.
        joined = all(count % _NESTED_BLOCK == 0 for count in blocks[:-1])
        rows = sum(out for out, _ in shapes)
        words = -(-(width // _NF4_BLOCK) // 4)
        tables = _NESTED_LEVELS_BYTES * (1 if joined else len(shapes))
        return codes + 4 * words * rows + scales + tables + 4 * rows

    def _nf4(self, weights: list[torch.Tensor]) -> list[FrozenWeight]:
        parts = [nf4.quantize(weight, double_quant=self.double_quant) for weight in weights]
        if dispatch.backend(self.device) == "triton":
            if quant.joinable_nf4(parts):
                return [Blocked(quant.arrange_nf4(parts))]
            if all(quant.joinable_nf4([part]) for part in parts):
                return [Blocked(quant.arrange_nf4([part])) for part in parts]
        # Blocks run over the flattened tensor: siblings can be joined only if each ends with a whole block.
        if len(parts) == 1 or self.double_quant or any(weight.numel() % 64 for weight in weights):
            return [Nf4(part) for part in parts]
        return [
            Nf4(
                Nf4Weight(
                    packed=torch.cat([part.packed for part in parts]),
                    absmax=torch.cat([cast(torch.Tensor, part.absmax) for part in parts]),
                    shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
                )
            )
        ]
