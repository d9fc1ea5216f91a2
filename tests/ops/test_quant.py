"""4-bit weights in the kernels' order: nothing is lost, the tables decode, and every product has a plan."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch

from loraplex_kernels import quant
from loraplex_kernels.quant import int4, lookup, nf4, tiles

HALF = [torch.bfloat16, torch.float16]


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], 1, generator=generator) + 0.01
    return torch.randn(shape, generator=generator) * scale


class Ptx:
    """Runs the instructions that the tables are read with, as the PTX manual has them."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.strip("{}\n ").splitlines()]
        self.steps = [line.rstrip(";").split(None, 1) for line in lines if not line.startswith(".reg")]

    def __call__(self, **operands: int) -> dict[str, int]:
        values = {f"${name[1:]}": value & 0xFFFFFFFF for name, value in operands.items()}

        def read(name: str) -> int:
            return values[name] if name in values else int(name, 0)

        for name, arguments in self.steps:
            to, *sources = (argument.strip() for argument in arguments.split(","))
            values[to] = getattr(self, name.replace(".", "_"))(*map(read, sources)) & 0xFFFFFFFF
        return values

    def mov_b32(self, a: int) -> int:
        return a

    def xor_b32(self, a: int, b: int) -> int:
        return a ^ b

    def and_b32(self, a: int, b: int) -> int:
        return a & b

    def shr_u32(self, a: int, b: int) -> int:
        return a >> b

    def lop3_b32(self, a: int, b: int, c: int, table: int) -> int:
        result = 0
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            result |= (table >> index & 1) << bit
        return result

    def prmt_b32(self, a: int, b: int, selector: int) -> int:
        pool = (b << 32 | a).to_bytes(8, "little")
        picked = []
        for position in range(4):
            choice = selector >> 4 * position & 15
            byte = pool[choice & 7]
            picked.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
        return int.from_bytes(bytes(picked), "little")

    def fma_rn_bf16x2(self, a: int, b: int, c: int) -> int:
        result = 0
        for shift in (0, 16):
            x, y, z = (bf16_value(word >> shift & 0xFFFF) for word in (a, b, c))
            result |= bf16_bits(x * y + z) << shift
        return result


def bf16_value(bits: int) -> float:
    return float(torch.tensor(bits << 16, dtype=torch.int64).to(torch.int32).view(torch.float32))


def bf16_bits(value: float) -> int:
    """The nearest bf16, ties to even; the argument is exact."""
    mantissa, exponent = math.frexp(value)
    rounded = math.ldexp(round(mantissa * 256), exponent - 8)
    return int(torch.tensor(rounded, dtype=torch.float32).view(torch.int32)) >> 16 & 0xFFFF


def half_values(low_word: int, high_word: int, dtype: torch.dtype) -> list[float]:
    bits = [word >> shift & 0xFFFF for word in (low_word, high_word) for shift in (0, 16)]
    signed = [value - (1 << 16) if value >> 15 else value for value in bits]
    return torch.tensor(signed, dtype=torch.int16).view(dtype).tolist()


def words_of_codes() -> list[int]:
    """Every byte in every place, and random words."""
    generator = random.Random(0)
    repeated = [int.from_bytes(bytes([byte] * 4), "little") for byte in range(256)]
    return repeated + [generator.getrandbits(32) for _ in range(500)]


@pytest.mark.parametrize("dtype", HALF)
def test_byte_permutes_look_up_every_level(dtype: torch.dtype) -> None:
    ptx = Ptx(lookup.nf4_ptx(dtype))
    table = {
        f"o{5 + 4 * index + copy}": word
        for index, word in enumerate(lookup.planes(dtype))
        for copy in range(4)
    }
    assert lookup.NF4_CONSTRAINTS.split(",") == ["=&r"] * 4 + ["r"] * 33
    levels = lookup.levels(torch.device("cpu")).to(dtype).tolist()
    for word in words_of_codes():
        found = ptx(o4=word, **table)
        codes = word.to_bytes(4, "little")
        assert half_values(found["$0"], found["$1"], dtype) == [levels[code & 15] for code in codes]
        assert half_values(found["$2"], found["$3"], dtype) == [levels[code >> 4] for code in codes]


@pytest.mark.parametrize("ones", [hex(lookup.ONES), "$13"])
def test_bit_patterns_decode_int4_with_one_rounding(ones: str) -> None:
    ptx = Ptx(lookup.int4_ptx(ones))
    generator = random.Random(1)
    for word in words_of_codes():
        # a scale and a zero for each of the eight weights: 0..3 low, 4..7 high
        scales = [bf16_bits(generator.uniform(0.001, 0.1)) for _ in range(8)]
        zeros = [bf16_bits(generator.uniform(-0.3, 0.3)) for _ in range(8)]
        operands = {"o4": word}
        for first, values in ((5, scales[:4]), (7, zeros[:4]), (9, scales[4:]), (11, zeros[4:])):
            operands[f"o{first}"] = values[0] | values[1] << 16
            operands[f"o{first + 1}"] = values[2] | values[3] << 16
        if ones == "$13":
            operands["o13"] = lookup.ONES
        found = ptx(**operands)
        codes = [byte & 15 for byte in word.to_bytes(4, "little")]
        codes += [byte >> 4 for byte in word.to_bytes(4, "little")]
        wanted = [
            bf16_value(bf16_bits((code - 8) * bf16_value(scale) + bf16_value(zero)))
            for code, scale, zero in zip(codes, scales, zeros, strict=True)
        ]
        assert half_values(found["$0"], found["$1"], torch.bfloat16) == wanted[:4]
        assert half_values(found["$2"], found["$3"], torch.bfloat16) == wanted[4:]


def test_operands_of_the_ptx_are_those_of_the_constraints() -> None:
    for text, constraints in (
        (lookup.nf4_ptx(torch.bfloat16), lookup.NF4_CONSTRAINTS),
        (lookup.nf4_ptx(torch.float16), lookup.NF4_CONSTRAINTS),
        (lookup.int4_ptx("0x3F803F80"), lookup.INT4_CONSTRAINTS),
        (lookup.int4_ptx("$13"), lookup.INT4_TILE_CONSTRAINTS),
    ):
        used = {int(number) for number in re.findall(r"\$(\d+)", text)}
        assert max(used) < len(constraints.split(","))
        assert {0, 1, 2, 3, 4} <= used


def test_labels_and_order_are_inverse_permutations() -> None:
    assert sorted(lookup.ORDER) == list(range(16))
    assert [lookup.ORDER[label] for label in lookup.LABELS] == list(range(16))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (70, 192), (1030, 128), (8, 4096)])
def test_nf4_keeps_its_values(shape: tuple[int, int], double_quant: bool) -> None:
    w = nf4.quantize(random_weight(shape), double_quant=double_quant)
    blocked = quant.arrange_nf4([w])
    assert blocked.shape == shape
    assert torch.equal(quant.dequantize(blocked), nf4.dequantize(w))
    assert torch.equal(quant.dequantize(blocked, torch.bfloat16), nf4.dequantize(w, torch.bfloat16))
    if not double_quant:
        assert blocked.nbytes == w.nbytes
    elif shape[1] % 256 == 0:
        assert blocked.nbytes == w.nbytes + 4 * shape[0] - 4, "an offset for each row instead of one"


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_values_are_those_of_bitsandbytes(double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    shape = (300, 192)
    packed, state = functional.quantize_4bit(
        random_weight(shape), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    absmax = state.absmax
    if double_quant:
        absmax = nf4.NestedAbsmax(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    blocked = quant.arrange_nf4([nf4.Nf4Weight(packed.flatten(), absmax, shape)])
    assert torch.equal(quant.dequantize(blocked), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("shape", "group"), [((5, 32), 32), ((70, 96), 32), ((33, 192), 64), ((1025, 256), 128), ((7, 384), 128)]
)
def test_int4_keeps_its_values(shape: tuple[int, int], group: int) -> None:
    w = int4.quantize(random_weight(shape) + 0.1, group=group)
    blocked = quant.arrange_int4(w)
    assert torch.equal(quant.dequantize(blocked), int4.dequantize(w))
    assert blocked.zero is None, "quantize chooses scales and zeros that bf16 holds"
    if shape[1] % 64 == 0:
        assert blocked.nbytes == w.nbytes - w.zero.nbytes


def test_int4_scales_that_bf16_cannot_hold_stay_exact() -> None:
    w = int4.quantize(random_weight((20, 128)))
    finer = int4.Int4Weight(w.packed, w.scale * 1.001, w.zero, w.shape, w.group)
    blocked = quant.arrange_int4(finer)
    assert blocked.zero is not None
    assert torch.equal(quant.dequantize(blocked), int4.dequantize(finer))


@pytest.mark.parametrize("double_quant", [False, True])
def test_siblings_become_one_weight(double_quant: bool) -> None:
    parts = [
        nf4.quantize(random_weight((rows, 128), seed=rows), double_quant=double_quant)
        for rows in (256, 128, 70)
    ]
    joined = quant.arrange_nf4(parts)
    assert joined.shape == (454, 128)
    assert torch.equal(quant.dequantize(joined), torch.cat([nf4.dequantize(part) for part in parts]))


def test_what_cannot_be_joined_is_refused() -> None:
    narrow, wide = nf4.quantize(torch.ones(4, 64)), nf4.quantize(torch.ones(4, 128))
    odd = nf4.quantize(torch.ones(4, 96))
    coarse = nf4.quantize(torch.ones(4, 128), block_size=128)
    nested = nf4.quantize(torch.ones(4, 64), double_quant=True)
    for weights in ([narrow, wide], [odd], [coarse], [nested, nested], [narrow, nested]):
        assert not quant.joinable_nf4(weights)
        with pytest.raises(ValueError, match="cannot be arranged as one"):
            quant.arrange_nf4(weights)


def test_bytes_and_tensors_are_told() -> None:
    blocked = quant.arrange_nf4([nf4.quantize(random_weight((70, 192)), double_quant=True)])
    assert sorted(blocked.tensors()) == ["codes", "nested.absmax", "nested.levels", "nested.offset", "scale"]
    assert blocked.nbytes == sum(tensor.nbytes for tensor in blocked.tensors().values())
    moved = blocked.to("cpu")
    for name, tensor in blocked.tensors().items():
        assert torch.equal(moved.tensors()[name], tensor)
    affine = int4.quantize(torch.randn(3, 64))
    assert sorted(quant.arrange_int4(affine).tensors()) == ["codes", "scale"]
    finer = int4.Int4Weight(affine.packed, affine.scale * 1.001, affine.zero, affine.shape, affine.group)
    assert sorted(quant.arrange_int4(finer).tensors()) == ["codes", "scale", "zero"]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_without_triton_the_product_is_the_dense_one(dtype: torch.dtype) -> None:
    blocked = quant.arrange_nf4([nf4.quantize(random_weight((70, 128)))])
    x, bias = random_weight((6, 128), seed=1).to(dtype).view(2, 3, 128), random_weight((1, 70))[0]
    exact = x.double() @ quant.dequantize(blocked).double().T + bias.double()
    y = quant.matmul(x, blocked, bias)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 70)
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    assert quant.matmul(x[:, :0], blocked).shape == (2, 0, 70)


def test_bad_arguments_are_named() -> None:
    blocked = quant.arrange_nf4([nf4.quantize(torch.ones(3, 64))])
    with pytest.raises(ValueError, match="x: last dimension is 65"):
        quant.matmul(torch.ones(1, 65), blocked)
    with pytest.raises(ValueError, match="x: expected float32"):
        quant.matmul(torch.ones(1, 64, dtype=torch.float64), blocked)
    with pytest.raises(ValueError, match=r"bias: expected \[3\]"):
        quant.matmul(torch.ones(1, 64), blocked, torch.ones(4))
    with pytest.raises(ValueError, match="x is on meta"):
        quant.matmul(torch.ones(1, 64, device="meta"), blocked)
    with pytest.raises(ValueError, match="lookup: expected one of permute, gather, load"):
        quant.Plan("tile", lookup="other")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (48, 64)])
def test_every_number_of_rows_has_a_plan(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    families = []
    for rows in (1, 2, 8, 9, 16, 17, 33, 64, 65, 200, 511, 512, 4096):
        plan = tiles.choose(rows, n, k // 64, dtype, 132)
        families.append(plan.family)
        if plan.family == "library":
            continue
        assert 1 <= plan.planes <= tiles.MAX_PLANES
        assert plan.planes == 1 or k // 64 >= 4 * plan.planes, "a plane must be worth a program"
        if rows <= 64 and dtype != torch.float32 and plan.family == "tile":
            assert rows <= plan.rows, "a decode step reads the weight once"
    assert families == sorted(families, key=["split", "tile", "library"].index)
    assert set(families) == {"split", "tile", "library"}
