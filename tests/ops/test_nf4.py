"""NF4: the format's values, bitsandbytes' bytes, and the product without a dense weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.quant import nf4, reference

SHAPES = [(64, 64), (7, 33), (128, 100), (1, 1), (5, 13), (1, 63), (96, 777), (33, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], 1, generator=generator) + 0.01
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as functional

    return functional


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tiles small enough that small weights take several of them."""
    monkeypatch.setattr(reference, "CHUNK", 4096)
    monkeypatch.setattr(reference, "CPU_TILE", 4096)


def test_levels_are_the_published_ones() -> None:
    published = (
        "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
        "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
        "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
        "0.7229568362236023 1.0"
    )
    assert nf4.NF4_LEVELS.tolist() == [float(level) for level in published.split()]


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA's construction: 8 and 9 even quantiles on either side of zero, scaled to [-1, 1]."""
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
    upper = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64))[:-1]
    lower = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat((lower, torch.zeros(1, dtype=torch.float64), upper.flip(0)))
    torch.testing.assert_close((levels / levels.max()).float(), nf4.NF4_LEVELS, rtol=0, atol=2e-6)


def test_each_level_has_its_code_even_element_in_the_high_nibble() -> None:
    weight = torch.cat((nf4.NF4_LEVELS, nf4.NF4_LEVELS.flip(0), torch.zeros(32)))[None] * 3
    w = nf4.quantize(weight)
    assert w.absmax.tolist() == [3.0]
    assert w.packed[:16].tolist() == [
        *(2 * i << 4 | 2 * i + 1 for i in range(8)),
        *(15 - 2 * i << 4 | 14 - 2 * i for i in range(8)),
    ]
    assert set(w.packed[16:].tolist()) == {0x77}
    torch.testing.assert_close(nf4.dequantize(w), weight, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_scales_equal_bitsandbytes(bnb, small_tiles, shape, dtype) -> None:
    weight = random_weight(shape, dtype=dtype)
    weight[: shape[0] // 3] = 0  # whole blocks of zeros among them
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    w = nf4.quantize(weight)
    assert torch.equal(w.packed, packed.flatten())
    assert torch.equal(w.absmax, state.absmax)


@pytest.mark.parametrize("block_size", [32, 128, 1024])
def test_other_block_sizes_equal_bitsandbytes(bnb, small_tiles, block_size) -> None:
    weight = random_weight((130, 1024))  # whole blocks in a row: see below
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    w = nf4.quantize(weight, block_size=block_size)
    assert torch.equal(w.packed, packed.flatten())
    assert torch.equal(w.absmax, state.absmax)
    assert torch.equal(nf4.dequantize(w), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantises_what_bitsandbytes_wrote(bnb, small_tiles, dtype, double_quant) -> None:
    # bitsandbytes' vectorised CPU code reads the wrong scales where a row is no whole number of blocks
    # (0.50.2: it does not give back what it quantised), so only such widths can be compared.
    weight = random_weight((300, 192), dtype=dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    absmax = state.absmax
    if double_quant:
        absmax = nf4.NestedAbsmax(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    w = nf4.Nf4Weight(packed.flatten(), absmax, (300, 192))
    assert torch.equal(nf4.dequantize(w, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(300, 160), (2000, 64), (7, 33), (1, 64)])
def test_double_quantisation_equals_bitsandbytes(bnb, shape) -> None:
    weight = random_weight(shape)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    w = nf4.quantize(weight, double_quant=True)
    assert isinstance(w.absmax, nf4.NestedAbsmax)
    assert torch.equal(w.packed, packed.flatten())
    assert torch.equal(w.absmax.levels, state.state2.code)
    torch.testing.assert_close(w.absmax.offset, state.offset, rtol=1e-6, atol=0)
    if torch.equal(w.absmax.offset, state.offset):
        assert torch.equal(w.absmax.codes, state.absmax)
        assert torch.equal(w.absmax.absmax, state.state2.absmax)


def test_double_quantisation_stays_near_the_exact_scales() -> None:
    weight = random_weight((700, 400))
    exact, nested = nf4.quantize(weight), nf4.quantize(weight, double_quant=True)
    assert torch.equal(exact.packed, nested.packed)
    assert nested.nbytes < 0.93 * exact.nbytes
    spread = (exact.block_absmax() - exact.block_absmax().mean()).abs().max()
    # The widest step of the 8-bit dynamic type is 0.0141 of its range.
    assert (nested.block_absmax() - exact.block_absmax()).abs().max() <= 0.0075 * spread
    assert torch.equal(nested.block_absmax(300, 1700), nested.block_absmax()[300:1700])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 200),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
def test_round_trip_takes_the_nearest_level(rows, width, seed, dtype) -> None:
    weight = random_weight((rows, width), seed, dtype)
    w = nf4.quantize(weight)
    scale = w.block_absmax().double().repeat_interleave(64)[: rows * width].clamp(min=1e-30)
    exact = weight.double().flatten() / scale
    error = (nf4.dequantize(w).double().flatten() / scale - exact).abs()
    nearest = (exact[:, None] - nf4.NF4_LEVELS.double()).abs().amin(dim=1)
    assert (error <= nearest + 1e-6).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (200, 100), (96, 777), (1, 3)])
def test_matmul_equals_the_dense_product(small_tiles, shape, dtype, double_quant) -> None:
    n, k = shape
    w = nf4.quantize(random_weight(shape), double_quant=double_quant)
    x = random_weight((3, k), seed=1, dtype=dtype)
    bias = random_weight((1, n), seed=2)[0]
    exact = x.double() @ nf4.dequantize(w).double().T + bias
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    magnitude = x.double().abs() @ nf4.dequantize(w).double().abs().T + bias.abs()
    out = nf4.matmul(x, w, bias)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= rounding * magnitude).all()


def test_matmul_keeps_leading_dimensions_and_takes_many_rows() -> None:
    w = nf4.quantize(random_weight((300, 256)))
    x = random_weight((2 * 70, 256), seed=3).view(2, 70, 256)
    out = nf4.matmul(x, w)
    assert out.shape == (2, 70, 300)
    torch.testing.assert_close(out, x @ nf4.dequantize(w).T, rtol=1e-4, atol=1e-4)
    assert nf4.matmul(x[:, :0], w).shape == (2, 0, 300)


def test_works_on_transposed_and_shifted_storage() -> None:
    weight = random_weight((96, 64)).t()
    w = nf4.quantize(weight)
    assert torch.equal(w.packed, nf4.quantize(weight.contiguous()).packed)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), w.packed))[1:]
    assert torch.equal(nf4.dequantize(nf4.Nf4Weight(shifted, w.absmax, w.shape)), nf4.dequantize(w))


def test_result_may_be_used_in_training() -> None:
    with torch.inference_mode():
        nf4.matmul(torch.ones(1, 64), nf4.quantize(random_weight((4, 64))))
    dense = nf4.dequantize(nf4.quantize(random_weight((4, 64))))
    x = torch.ones(1, 64, requires_grad=True)
    (x @ dense.T).sum().backward()
    torch.testing.assert_close(x.grad[0], dense.sum(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 70, 4999])
def test_inf_and_nan_are_rejected(bad, position) -> None:
    weight = torch.ones(50, 100)
    weight.view(-1)[position] = bad
    with pytest.raises(ValueError, match="inf or NaN"):
        nf4.quantize(weight)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="weight: expected a non-empty matrix"):
        nf4.quantize(torch.ones(3))
    with pytest.raises(ValueError, match="weight: expected a non-empty matrix"):
        nf4.quantize(torch.ones(0, 4))
    with pytest.raises(ValueError, match="weight: expected float32"):
        nf4.quantize(torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="block_size"):
        nf4.quantize(torch.ones(3, 4), block_size=48)
    w = nf4.quantize(torch.ones(3, 64))
    with pytest.raises(ValueError, match="x: last dimension is 65"):
        nf4.matmul(torch.ones(1, 65), w)
    with pytest.raises(ValueError, match="packed"):
        nf4.Nf4Weight(w.packed, w.absmax, (3, 65))
    with pytest.raises(ValueError, match="absmax"):
        nf4.Nf4Weight(w.packed, w.absmax, (3, 64), block_size=128)
