"""The dense product agrees with torch's own on either library."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels import dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 1024, 768), (65, 384, 512)])
def test_linear_equals_the_float64_product(dtype, transposed, biased, shape) -> None:
    rows, n, k = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, k, generator=generator).to(dtype)
    weight = torch.randn((k, n) if transposed else (n, k), generator=generator).to(dtype)
    weight = weight.t() if transposed else weight
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + 4
    out = dense.linear(x, weight, bias)
    assert out.shape == (1, rows, n)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= (2**-7 if dtype == torch.bfloat16 else 1e-6) * magnitude).all()


def test_small_products_and_no_rows_are_served() -> None:
    assert dense.linear(torch.ones(0, 64), torch.ones(8, 64)).shape == (0, 8)
    assert dense.linear(torch.ones(2, 64), torch.ones(8, 64)).tolist() == [[64.0] * 8] * 2


def test_many_row_counts_take_few_shapes() -> None:
    """oneDNN keeps the code of every shape that it compiles, so a server must not use new shapes forever."""
    padded = [dense.padded_rows(rows) for rows in range(1, 4097)]
    assert all(rows <= found for rows, found in enumerate(padded, start=1))
    assert all(found <= max(rows + 7, rows * 1.25) for rows, found in enumerate(padded, start=1))
    assert len(set(padded)) <= 40


@pytest.mark.parametrize("rows", range(3, 40, 3))
def test_padding_changes_nothing(rows: int) -> None:
    x, weight = torch.randn(2, rows, 320), torch.randn(1024, 320)
    out = dense.linear(x, weight)
    assert out.shape == (2, rows, 1024)
    torch.testing.assert_close(out, (x.double() @ weight.double().T).float(), rtol=1e-4, atol=1e-3)
