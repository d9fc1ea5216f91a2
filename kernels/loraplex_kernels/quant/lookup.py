"""Decoding of 4-bit codes to operands of the matrix unit: tables, and the PTX that reads them.

A table of 16 half-precision levels is 32 bytes: two planes (low and high bytes) of 16. ``prmt`` picks four
bytes out of eight by four 3-bit numbers, so a plane takes two of them, for four codes at once. Where the
fourth bit of a selector is set, ``prmt`` repeats the picked byte's sign bit over the whole byte instead. With
the upper eight codes looked up by inverted fourth bits, the xor of both results is the level, once each table
byte is corrected by what its partner repeats; that works where codes ``i`` and ``i + 8`` agree in the top bit
of both bytes. Relabelled by `ORDER`, NF4's levels do in bfloat16 (zero as its negative). In float16 no order
does, so there the fourth bit selects between the two results.

By the compiler's output for sm_90, a 16-row product costs 4.3 instructions a weight with this, none of them
to memory or between lanes; with `tl.gather` 7.3, one of them a read of shared memory; with loads 8.5, one of
them an asynchronous copy. The latter two are kept as candidates for measurement, and for what has no PTX.

Nothing here imports triton: the tests run these very instructions in Python.
"""

from __future__ import annotations

import functools

import torch

from loraplex_kernels.quant.nf4 import NF4_LEVELS

ORDER = (0, 3, 1, 2, 8, 11, 9, 10, 4, 6, 5, 7, 12, 15, 13, 14)
"""NF4's code of each label: codes are stored relabelled."""

LABELS: tuple[int, ...] = tuple(ORDER.index(code) for code in range(16))
"""Label of each NF4 code."""

LOOKUPS = ("permute", "gather", "load")
"""Ways to look a level up: byte permutes (half precision alone), a gather from registers, loads."""


@functools.lru_cache(maxsize=8)
def levels(device: torch.device) -> torch.Tensor:
    """NF4's levels by label, fp32 [16]."""
    with torch.inference_mode(False):
        return NF4_LEVELS[list(ORDER)].to(device)


@functools.lru_cache(maxsize=4)
def planes(dtype: torch.dtype) -> tuple[int, ...]:
    """The eight words (signed 32-bit) that `nf4_ptx` picks from: low bytes of labels 0..7, of 8..15, high
    bytes of the same.
    """
    values = NF4_LEVELS[list(ORDER)].to(dtype)
    if dtype == torch.bfloat16:
        values[ORDER.index(7)] = -0.0
    bits = [value & 0xFFFF for value in values.view(torch.int16).tolist()]
    tables = []
    for shift in (0, 8):
        lower = [(value >> shift) & 0xFF for value in bits[:8]]
        upper = [(value >> shift) & 0xFF for value in bits[8:]]
        if dtype == torch.bfloat16:
            pairs = [_corrected(*pair) for pair in zip(lower, upper, strict=True)]
            lower, upper = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        tables += [lower, upper]
    packed = [int.from_bytes(bytes(table[i : i + 4]), "little") for table in tables for i in (0, 4)]
    return tuple(word - (1 << 32) if word >> 31 else word for word in packed)


def _corrected(lower: int, upper: int) -> tuple[int, int]:
    """Table bytes whose xor with what the other repeats is what was asked for."""
    if (lower ^ upper) & 0x80:
        raise ValueError("partners must agree in the top bit")
    # One of the two keeps its sign bit clear, so it repeats zeros; the other, with the bit set, repeats ones.
    return (lower, upper ^ 0xFF) if lower & 0x80 else (lower, upper)


# Operands: two words of low nibbles' levels, two of high nibbles', the codes, and the table's eight words,
# each four times (an operand comes once for each of the four bytes that are decoded together).
NF4_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 33)
_WORD = tuple(f"${5 + 4 * index}" for index in range(8))


def nf4_ptx(dtype: torch.dtype) -> str:
    """Four bytes, eight labels, to eight levels in `dtype` (bf16 or fp16): low nibbles first."""
    lines = [".reg .b32 lower, upper, lower_hi, upper_hi, a, b, low, high;"]
    if dtype == torch.bfloat16:
        lines += ["xor.b32 upper, $4, 0x88888888;", "mov.b32 lower, $4;"]
        merge = "xor.b32 {to}, a, b;"
    else:
        lines += [
            "and.b32 lower, $4, 0x77777777;",
            "shr.u32 upper, $4, 1;",
            "lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xEA;",
        ]
        merge = "prmt.b32 {to}, a, b, {upper};"
    lines += ["shr.u32 lower_hi, lower, 16;", "shr.u32 upper_hi, upper, 16;"]
    for lower, upper, low_nibbles, high_nibbles in (
        ("lower", "upper", "$0", "$2"),
        ("lower_hi", "upper_hi", "$1", "$3"),
    ):
        second = upper if dtype == torch.bfloat16 else lower
        for plane, to in ((0, "low"), (4, "high")):
            lines += [
                f"prmt.b32 a, {_WORD[plane]}, {_WORD[plane + 1]}, {lower};",
                f"prmt.b32 b, {_WORD[plane + 2]}, {_WORD[plane + 3]}, {second};",
                merge.format(to=to, upper=upper),
            ]
        lines += [
            f"prmt.b32 {low_nibbles}, low, high, 0x6240;",
            f"prmt.b32 {high_nibbles}, low, high, 0x7351;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


# Operands: as above, then scale and zero of the low nibbles and of the high ones, two words each.
INT4_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 9)
# The same, and `ONES` four times. An operand that is not a load keeps Triton from decoding in wgmma's operand
# layout, where bytes come in pairs that would first have to be put together.
INT4_TILE_CONSTRAINTS = INT4_CONSTRAINTS + ",r" * 4
ONES = 0x3F803F80
"""Two ones in bf16."""


def int4_ptx(ones: str) -> str:
    """Four bytes, eight codes, to ``(code - 8) * scale + zero`` in bf16, rounded once.

    A code in the low mantissa bits of bf16's 128 is 128 + code; from there 136 is taken, exactly.

    Args:
        ones: the operand that holds `ONES`, or the number itself.
    """
    lines = [
        ".reg .b32 codes, part, ones, offset;",
        f"mov.b32 ones, {ones};",
        "mov.b32 offset, 0xC308C308;",
        "prmt.b32 codes, $4, $4, 0x3120;",
    ]
    for to, shift, scale, zero in (("$0", 0, 5, 7), ("$1", 8, 6, 8), ("$2", 4, 9, 11), ("$3", 12, 10, 12)):
        lines += [
            f"shr.u32 part, codes, {shift};",
            "lop3.b32 part, part, 0x000F000F, 0x43004300, 0xEA;",
            "fma.rn.bf16x2 part, part, ones, offset;",
            f"fma.rn.bf16x2 {to}, part, ${scale}, ${zero};",
        ]
    return "{\n" + "\n".join(lines) + "\n}"
