"""4-bit weights in the order in which the Triton kernels read them.

Codes lie in blocks of 64 input columns, which is NF4's own block: for each block, for each output row, 32
bytes. Byte ``j`` holds column ``j`` of the block in its low nibble and column ``j + 32`` in the high one, so
that the low nibbles of a tile are one matrix operand and the high ones another, with no interleaving. Rows of
a block follow each other: what a program reads in one step is one contiguous piece. Scales lie likewise, rows
innermost, in 4-byte words, which is the least that the hardware copies to shared memory ahead of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from loraplex_kernels.quant import lookup
from loraplex_kernels.quant.int4 import Int4Weight
from loraplex_kernels.quant.nf4 import NESTED_BLOCK, NestedAbsmax, Nf4Weight

BLOCK = 64
"""Input columns of a block of codes."""

_HALF = BLOCK // 2
# Output rows repacked at once: bounds the temporaries.
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class NestedScale:
    """The parts of double-quantised NF4 scales: ``levels[code] * absmax + offset``.

    Attributes:
        absmax: fp32 [ceil(N * blocks / 256)], of 256 codes each, counted along a row's blocks, row by row.
        levels: fp32 [256].
        offset: fp32 [N], of each output row.
    """

    absmax: Tensor
    levels: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class BlockedWeight:
    """A linear layer's weight in NF4 or affine int4, as the kernels read it.

    Attributes:
        format: "nf4" or "int4".
        codes: uint8 [blocks, N, 32]. NF4's are relabelled by `lookup.LABELS`.
        scale: nf4: fp32 [blocks, N], or with `nested` the 8-bit codes of it, those of four blocks in an int32
            [ceil(blocks / 4), N], the first lowest; int4: [groups, N], fp32, or int32 with the scale as bf16
            in the low half and the zero in the high one, where bf16 holds both exactly.
        zero: int4: fp32 [groups, N], or None where `scale` holds it; nf4: None.
        nested: of double-quantised nf4.
        shape: (N, K) = (output width, input width).
        group: input columns that share a scale: 64 for nf4; 128, 64 or 32 for int4.
    """

    format: Literal["nf4", "int4"]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    nested: NestedScale | None
    shape: tuple[int, int]
    group: int

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.codes.device

    @property
    def blocks(self) -> int:
        """Blocks of codes along K; the last may be half filled, its rest being zero in int4."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of this weight."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, for checksums and memory accounts."""
        found = {"codes": self.codes, "scale": self.scale}
        if self.zero is not None:
            found["zero"] = self.zero
        if self.nested is not None:
            found["nested.absmax"] = self.nested.absmax
            found["nested.levels"] = self.nested.levels
            found["nested.offset"] = self.nested.offset
        return found

    def to(self, device: torch.device | str) -> BlockedWeight:
        """The same weight on another device."""
        nested = self.nested
        if nested is not None:
            nested = NestedScale(nested.absmax.to(device), nested.levels.to(device), nested.offset.to(device))
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=None if self.zero is None else self.zero.to(device),
            nested=nested,
        )


def joinable_nf4(weights: Sequence[Nf4Weight]) -> bool:
    """True if `arrange_nf4` takes these weights, as one.

    Widths must be equal multiples of 64, cut into blocks of 64. Double-quantised scales share their own scale
    by 256, which must not straddle two weights.
    """
    widths = {w.shape[1] for w in weights}
    if len(widths) != 1 or widths.pop() % BLOCK or any(w.block_size != BLOCK for w in weights):
        return False
    nested = [isinstance(w.absmax, NestedAbsmax) for w in weights]
    if not any(nested):
        return True
    return all(nested) and all(w.num_blocks % NESTED_BLOCK == 0 for w in weights[:-1])


def arrange_nf4(weights: Sequence[Nf4Weight]) -> BlockedWeight:
    """Repack NF4 weights of one input width, as one weight whose output rows follow each other.

    Raises:
        ValueError: if `joinable_nf4` does not allow it.
    """
    if not joinable_nf4(weights):
        shapes = [w.shape for w in weights]
        raise ValueError(f"weights: cannot be arranged as one, shapes {shapes}; arrange them one by one")
    k = weights[0].shape[1]
    blocks = k // BLOCK
    labels = torch.tensor(lookup.LABELS, dtype=torch.uint8, device=weights[0].device)
    codes = _arrange_codes([w.packed.view(w.shape[0], k // 2) for w in weights], blocks, labels)
    absmaxes = [w.absmax for w in weights]
    nested = None
    if isinstance(absmaxes[0], NestedAbsmax):
        inner = [absmax for absmax in absmaxes if isinstance(absmax, NestedAbsmax)]
        nested = NestedScale(
            absmax=torch.cat([absmax.absmax for absmax in inner]),
            levels=inner[0].levels,
            offset=torch.cat(
                [absmax.offset.expand(w.shape[0]) for absmax, w in zip(inner, weights, strict=True)]
            ),
        )
        scale = _in_words(torch.cat([absmax.codes.view(-1, blocks) for absmax in inner]))
    else:
        plain = [absmax for absmax in absmaxes if isinstance(absmax, Tensor)]
        scale = torch.cat([absmax.view(-1, blocks) for absmax in plain]).t().contiguous()
    return BlockedWeight("nf4", codes, scale, None, nested, (codes.shape[1], k), BLOCK)


def arrange_int4(w: Int4Weight) -> BlockedWeight:
    """Repack an int4 weight. Where the width ends with half a block, the rest gets scale and zero 0."""
    n, k = w.shape
    blocks = -(-k // BLOCK)
    codes = _arrange_codes([w.packed], blocks, None)
    groups = -(-blocks * BLOCK // w.group)
    padding = (0, 0, 0, groups - k // w.group)
    scale = torch.nn.functional.pad(w.scale.t(), padding).contiguous()
    zero = torch.nn.functional.pad(w.zero.t(), padding).contiguous()
    halves = torch.stack((scale, zero), dim=2).bfloat16()
    if torch.equal(halves.float(), torch.stack((scale, zero), dim=2)):
        return BlockedWeight("int4", codes, halves.view(torch.int32)[..., 0], None, None, (n, k), w.group)
    return BlockedWeight("int4", codes, scale, zero, None, (n, k), w.group)


def _in_words(codes: Tensor) -> Tensor:
    """uint8 [N, blocks] to int32 [ceil(blocks / 4), N]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    return padded.view(torch.int32).t().contiguous()


def _arrange_codes(parts: Sequence[Tensor], blocks: int, labels: Tensor | None) -> Tensor:
    """uint8 [N_i, K / 2], the even element in the high nibble, to [blocks, N, 32]."""
    n = sum(part.shape[0] for part in parts)
    out = torch.zeros(blocks, n, _HALF, dtype=torch.uint8, device=parts[0].device)
    first = 0
    for part in parts:
        for start in range(0, part.shape[0], _ROWS):
            packed = part[start : start + _ROWS]
            codes = torch.stack((packed >> 4, packed & 15), dim=2).view(packed.shape[0], -1)
            if labels is not None:
                codes = labels[codes.int()]
            codes = torch.nn.functional.pad(codes, (0, blocks * BLOCK - codes.shape[1]))
            low, high = codes.view(-1, blocks, 2, _HALF).permute(2, 1, 0, 3)
            out[:, first : first + packed.shape[0]] = low | (high << 4)
            first += packed.shape[0]
    return out


def dequantize(w: BlockedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight, [N, K] in ``dtype`` (computed in fp32 and rounded once), in plain torch."""
    n, k = w.shape
    codes = torch.cat((w.codes & 15, w.codes >> 4), dim=2)
    if w.format == "nf4":
        values = lookup.levels(w.device)[codes.int()] * _nf4_scale(w)[..., None]
    else:
        affine = _int4_affine(w)
        column = torch.arange(w.blocks * BLOCK, device=w.device)
        group = (column // w.group).view(w.blocks, BLOCK)
        scale, zero = (tensor[group].transpose(1, 2) for tensor in affine)
        values = (codes.float() - 8).mul_(scale).add_(zero)
    return values.transpose(0, 1).reshape(n, -1)[:, :k].to(dtype)


def _int4_affine(w: BlockedWeight) -> tuple[Tensor, Tensor]:
    """Scale and zero, fp32 [groups, N]."""
    if w.zero is not None:
        return w.scale, w.zero
    scale, zero = w.scale.view(torch.bfloat16).float().view(*w.scale.shape, 2).unbind(2)
    return scale, zero


def _nf4_scale(w: BlockedWeight) -> Tensor:
    """fp32 [blocks, N]."""
    if w.nested is None:
        return w.scale
    n = w.shape[0]
    index = torch.arange(n * w.blocks, device=w.device).view(n, w.blocks).t() // NESTED_BLOCK
    codes = w.scale.t().contiguous().view(torch.uint8)[:, : w.blocks].t()
    return w.nested.levels[codes.int()] * w.nested.absmax[index] + w.nested.offset
