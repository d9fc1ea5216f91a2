"""Affine int4: rounding, the product without a dense weight, and torch's packed CPU kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_kernels.quant import cpu_packed, int4, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_packed_kernel = pytest.mark.skipif(
    not cpu_packed.supported((64, 64), 64), reason="this torch has no packed int4 CPU kernel"
)


def random_weight(
    shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32, offset: float = 0.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], 1, generator=generator) + 0.01
    return (torch.randn(shape, generator=generator) * scale + offset).to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tiles small enough that small weights take several of them."""
    monkeypatch.setattr(reference, "CHUNK", 4096)
    monkeypatch.setattr(reference, "CPU_TILE", 4096)
    monkeypatch.setattr(cpu_packed, "_TILE", 1 << 14)


@pytest.mark.parametrize(("width", "group"), [(4096, 128), (192, 64), (96, 32), (32, 32), (128, 128)])
def test_group_is_the_largest_that_divides(width, group) -> None:
    assert int4.choose_group(width) == group


@pytest.mark.parametrize("width", [0, 1, 33, 100, 4097])
def test_width_that_no_group_divides_is_refused_with_a_remedy(width) -> None:
    with pytest.raises(ValueError, match=r"multiple of 32.*--quantization nf4"):
        int4.choose_group(width)


def test_codes_lie_two_to_a_byte_even_element_first() -> None:
    weight = torch.arange(16.0).repeat(2)[None] - 8
    w = int4.quantize(weight)
    assert w.scale.tolist() == [[1.0]]
    assert w.zero.tolist() == [[0.0]]
    assert w.packed.tolist() == [[2 * i << 4 | 2 * i + 1 for i in range(8)] * 2]
    assert torch.equal(int4.dequantize(w), weight)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 0.5, -20.0]),
)
def test_round_trip_error_is_at_most_half_a_step(rows, groups, group, seed, dtype, offset) -> None:
    weight = random_weight((rows, groups * group), seed, dtype, offset)
    w = int4.quantize(weight, group=group)
    error = (int4.dequantize(w).double() - weight.double()).abs().view(rows, groups, group)
    spread = weight.double().view(rows, groups, group)
    spread = spread.amax(2) - spread.amin(2)
    fp32_rounding = 1e-6 * weight.double().abs().max()
    assert (error <= w.scale.double()[..., None] / 2 + fp32_rounding).all()
    # Rounding zero and step to bf16 costs at most 2^-7 of the step and 2^-8 of the zero, shared by 7 steps.
    bound = spread / 15 * (1 + 2**-6) + w.zero.double().abs() * 2**-8 / 7 * 1.1
    assert (w.scale.double() <= bound + 1e-30).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e-6, 1234.567])
def test_constant_groups_are_nearly_exact(value) -> None:
    weight = torch.full((2, 64), value)
    torch.testing.assert_close(int4.dequantize(int4.quantize(weight)), weight, rtol=2e-5, atol=0)


def test_scales_and_zeros_are_bf16_numbers() -> None:
    w = int4.quantize(random_weight((70, 256), offset=0.1))
    assert torch.equal(w.scale.bfloat16().float(), w.scale)
    assert torch.equal(w.zero.bfloat16().float(), w.zero)


def test_chunks_do_not_show(small_tiles, monkeypatch) -> None:
    weight = random_weight((201, 96))
    chunked = int4.quantize(weight)
    monkeypatch.undo()
    whole = int4.quantize(weight)
    for name, tensor in whole.tensors().items():
        assert torch.equal(chunked.tensors()[name], tensor), name
    assert torch.equal(int4.dequantize(chunked), int4.dequantize(whole))


def test_dequantise_rounds_once() -> None:
    w = int4.quantize(random_weight((70, 256)))
    assert torch.equal(int4.dequantize(w, torch.bfloat16), int4.dequantize(w).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (7, 32), (200, 96), (33, 384), (1, 128)])
def test_matmul_equals_the_dense_product(small_tiles, shape, dtype) -> None:
    n, k = shape
    w = int4.quantize(random_weight(shape))
    x = random_weight((5, k), seed=1, dtype=dtype)
    bias = random_weight((1, n), seed=2)[0]
    dense = int4.dequantize(w).double()
    out = int4.matmul(x, w, bias)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    magnitude = x.double().abs() @ dense.abs().T + bias.abs()
    assert out.dtype == dtype
    assert ((out.double() - (x.double() @ dense.T + bias)).abs() <= rounding * magnitude).all()
    assert int4.matmul(x.view(1, 5, k)[:, :0], w).shape == (1, 0, n)


@needs_packed_kernel
@pytest.mark.parametrize(
    "shape", [(16, 32), (48, 96), (64, 64), (112, 128), (192, 192), (208, 256), (400, 640)]
)
def test_packed_weight_is_the_same_weight(small_tiles, shape) -> None:
    if cpu_packed.layout_block() is None:
        pytest.skip("the packed kernel's layout is unknown on this processor")
    w = int4.quantize(random_weight(shape, offset=0.05))
    packed = cpu_packed.PackedInt4Weight.from_int4(w)
    assert torch.equal(cpu_packed.dequantize(packed), int4.dequantize(w))
    assert packed.nbytes <= w.nbytes


@needs_packed_kernel
@pytest.mark.parametrize("tile_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 32), (112, 128), (192, 192), (400, 640)])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_packed_and_tiled_products_are_within_bf16_rounding(
    small_tiles, monkeypatch, shape, rows, tile_dtype
) -> None:
    if cpu_packed.layout_block() is None:
        pytest.skip("the packed kernel's layout is unknown on this processor")
    monkeypatch.setattr(cpu_packed, "tile_dtype", lambda: tile_dtype)
    w = int4.quantize(random_weight(shape, offset=0.05))
    packed = cpu_packed.PackedInt4Weight.from_int4(w)
    x = random_weight((rows, shape[1]), seed=1)
    dense = int4.dequantize(w).double()
    exact, magnitude = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    for product in (cpu_packed.matmul_packed, cpu_packed.matmul_tiled):
        error = (product(x, packed).double() - exact).abs()
        assert (error <= 2**-8 * magnitude).all(), product.__name__
        # Errors of single roundings are independent: their sum is far smaller than the bound.
        assert error.square().mean().sqrt() <= 2**-8 * exact.square().mean().sqrt(), product.__name__
    if tile_dtype == torch.float32:
        assert ((cpu_packed.matmul_tiled(x, packed).double() - exact).abs() <= 1e-6 * magnitude).all()


@needs_packed_kernel
@pytest.mark.parametrize("rows", [1, 200])
def test_the_number_of_rows_chooses_the_product(monkeypatch, rows) -> None:
    if cpu_packed.layout_block() is None:
        pytest.skip("the packed kernel's layout is unknown on this processor")
    calls: list[str] = []
    for name in ("matmul_packed", "matmul_tiled"):
        product = getattr(cpu_packed, name)
        monkeypatch.setattr(
            cpu_packed, name, lambda r, w, name=name, product=product: (calls.append(name), product(r, w))[1]
        )
    w = cpu_packed.PackedInt4Weight.from_int4(int4.quantize(random_weight((768, 1024))))
    x, bias = random_weight((rows, 1024), seed=1), random_weight((1, 768), seed=2)[0]
    out = cpu_packed.matmul(x[None], w, bias)
    assert calls == ["matmul_packed" if rows == 1 else "matmul_tiled"]
    assert out.shape == (1, rows, 768)
    assert out.dtype == torch.float32
    exact = x.double() @ cpu_packed.dequantize(w).double().T + bias
    assert (out[0].double() - exact).square().mean().sqrt() <= 2**-8 * exact.square().mean().sqrt()


@needs_packed_kernel
def test_unknown_layout_leaves_every_row_count_to_the_packed_kernel(monkeypatch) -> None:
    w = cpu_packed.PackedInt4Weight.from_int4(int4.quantize(random_weight((768, 1024))))
    x = random_weight((200, 1024))
    known = cpu_packed.matmul_packed(x, w).float()
    monkeypatch.setattr(cpu_packed, "_BLOCKS", (48,))  # the self-check compares, and finds no match
    cpu_packed.layout_block.cache_clear()
    try:
        assert cpu_packed.layout_block() is None
        assert torch.equal(cpu_packed.matmul(x, w), known)
        with pytest.raises(RuntimeError, match="layout"):
            cpu_packed.matmul_tiled(x, w)
    finally:
        cpu_packed.layout_block.cache_clear()


def test_what_the_packed_kernel_cannot_take_is_refused() -> None:
    assert not cpu_packed.supported((24, 128), 128)
    assert not cpu_packed.supported((32, 100), 32)
    assert not cpu_packed.supported((32, 64), 16)
    with pytest.raises(ValueError, match="multiples of 16"):
        cpu_packed.PackedInt4Weight.from_int4(int4.quantize(random_weight((24, 128))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 70, 6399])
def test_inf_and_nan_are_rejected(bad, position) -> None:
    weight = torch.ones(50, 128)
    weight.view(-1)[position] = bad
    with pytest.raises(ValueError, match="inf, NaN"):
        int4.quantize(weight)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="weight: expected a non-empty matrix"):
        int4.quantize(torch.ones(32))
    with pytest.raises(ValueError, match="weight: expected float32"):
        int4.quantize(torch.ones(3, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match="group"):
        int4.quantize(torch.ones(3, 64), group=128)
    with pytest.raises(ValueError, match="multiple of 32"):
        int4.quantize(torch.ones(3, 65))
    w = int4.quantize(torch.ones(16, 64))
    with pytest.raises(ValueError, match="x: last dimension is 65"):
        int4.matmul(torch.ones(1, 65), w)
    with pytest.raises(ValueError, match="packed"):
        int4.Int4Weight(w.packed, w.scale, w.zero, (16, 128), 64)
    with pytest.raises(ValueError, match="scale"):
        int4.Int4Weight(w.packed, w.scale[:1], w.zero, (16, 64), 64)
