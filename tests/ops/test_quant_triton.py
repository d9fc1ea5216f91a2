"""The Triton kernels of the 4-bit products against float64: natively on CUDA, else through the interpreter.

As for the LoRA kernels, without a GPU this file runs itself in a process of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from loraplex_kernels import dispatch, quant
from loraplex_kernels.quant import Plan, int4, nf4, tiles

pytest.importorskip("triton")

INTERPRETED = dispatch.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["nf4", "nf4-double", "int4-128", "int4-64", "int4-32", "int4-128-fp32"]


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "not kernels_wide")


@pytest.mark.kernels_wide
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_wide_sweep_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "kernels_wide")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def among_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the middle of a buffer of NaN (or 255): reading outside shows in the result."""
    poison = float("nan") if tensor.is_floating_point() else 255
    buffer = torch.full((tensor.numel() + 64,), poison, dtype=tensor.dtype)
    window = buffer[32 : 32 + tensor.numel()]
    window.copy_(tensor.flatten())
    on_device = buffer.to(DEVICE)
    return on_device[32 : 32 + tensor.numel()].view(tensor.shape)


def make_weight(format_: str, n: int, k: int, seed: int = 0) -> tuple[quant.BlockedWeight, torch.Tensor]:
    """A weight on the device, among poison, and its values in float64 by the plain reference."""
    values = normal(n, k, seed=seed) * (torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) + 0.1)
    if format_.startswith("nf4"):
        w = nf4.quantize(values, double_quant=format_ == "nf4-double")
        blocked, dense = quant.arrange_nf4([w]), nf4.dequantize(w)
    else:
        affine = int4.quantize(values + 0.2, group=group_of(format_))
        if format_.endswith("fp32"):  # scales that bf16 does not hold
            affine = dataclasses.replace(affine, scale=affine.scale * 1.001)
        blocked, dense = quant.arrange_int4(affine), int4.dequantize(affine)
    nested = blocked.nested
    if nested is not None:
        nested = quant.NestedScale(
            among_nan(nested.absmax), among_nan(nested.levels), among_nan(nested.offset)
        )
    blocked = dataclasses.replace(
        blocked,
        codes=among_nan(blocked.codes),
        scale=among_nan(blocked.scale),
        zero=None if blocked.zero is None else among_nan(blocked.zero),
        nested=nested,
    )
    return blocked, dense.double()


def group_of(format_: str) -> int:
    return int(format_.split("-")[1])


class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def triton_kernels(self) -> Iterator[None]:
        dispatch.launches.clear()
        with dispatch.using("triton"):
            yield

    @pytest.fixture(autouse=True)
    def poisoned_results(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Results and planes begin as NaN, and nothing is written beside them."""
        from loraplex_kernels.quant import launch

        buffers: list[tuple[torch.Tensor, int]] = []

        def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            size = torch.Size(shape).numel()
            buffer = torch.full((size + 64,), float("nan"), dtype=dtype, device=device)
            buffers.append((buffer, size))
            return buffer[32 : 32 + size].view(shape)

        monkeypatch.setattr(launch, "_empty", empty)
        yield
        assert buffers
        for buffer, size in buffers:
            assert not buffer[32 : 32 + size].isnan().any(), "an element was not written"
            assert buffer[:32].isnan().all(), "written before the result"
            assert buffer[32 + size :].isnan().all(), "written behind the result"

    def check(
        self,
        format_: str,
        rows: int,
        n: int,
        k: int,
        dtype: torch.dtype,
        *,
        plan: Plan | None = None,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        w, dense = make_weight(format_, n, k, seed)
        x = normal(rows, k + 16, seed=seed + 1).to(dtype)
        x[:, k:] = float("nan")
        x = among_nan(x)[:, :k]
        b = normal(n, seed=seed + 2).to(dtype) if bias else None
        y = quant.matmul(x, w, None if b is None else among_nan(b), plan=plan).cpu()
        assert y.dtype == dtype
        assert y.shape == (rows, n)
        exact_x = x.cpu().double()
        exact = exact_x @ dense.T
        summed = exact_x.abs() @ dense.abs().T
        weights_rounded = torch.sqrt(exact_x.square() @ dense.square().T)
        if b is not None:
            exact, summed = exact + b.double(), summed + b.double().abs()
        # One rounding of the result, one of each weight (independent: their squares add), fp32 sums.
        epsilon = torch.finfo(dtype).eps / 2
        tolerance = 1.01 * epsilon * exact.abs() + 2e-6 * summed
        if dtype != torch.float32:
            tolerance += 5 * epsilon * weights_rounded
        error = (y.double() - exact).abs()
        worst = (error / tolerance).nan_to_num(nan=float("inf")).max()
        assert bool((error <= tolerance).all()), f"an error is {worst} times the tolerance"

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format_", FORMATS)
    @pytest.mark.parametrize("rows", [1, 17])
    def test_families(self, format_: str, rows: int, dtype: torch.dtype) -> None:
        self.check(format_, rows, 72, 384, dtype)

    @pytest.mark.parametrize("format_", FORMATS)
    def test_many_rows(self, format_: str) -> None:
        self.check(format_, 70, 72, 256, torch.bfloat16)

    @pytest.mark.parametrize("rows", [2, 8, 9, 16, 33, 64, 65, 129])
    def test_edges_of_the_families(self, rows: int) -> None:
        self.check("nf4", rows, 33, 192, torch.bfloat16, seed=rows)

    @pytest.mark.parametrize("format_", ["nf4", "nf4-double", "int4-32"])
    @pytest.mark.parametrize(("n", "k"), [(1, 64), (17, 64), (130, 128), (257, 192)])
    def test_odd_shapes(self, format_: str, n: int, k: int) -> None:
        for rows in (3, 20):
            self.check(format_, rows, n, k, torch.float16, bias=rows == 3)

    @pytest.mark.parametrize("rows", [1, 5, 20, 70])
    @pytest.mark.parametrize("k", [32, 96, 160])
    def test_half_a_block_at_the_end(self, rows: int, k: int) -> None:
        self.check("int4-32", rows, 40, k, torch.bfloat16)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("planes", "unroll"), [(2, 2), (3, 2), (4, 1), (16, 1)])
    def test_planes(self, planes: int, unroll: int, bias: bool) -> None:
        plan = Plan("tile", rows=16, columns=64, planes=planes, unroll=unroll)
        self.check("nf4", 11, 70, 640, torch.bfloat16, plan=plan, bias=bias)
        assert dispatch.launches["quant.sum_planes.triton"] == 1

    @pytest.mark.parametrize("family", ["split", "tile"])
    @pytest.mark.parametrize("lookup", ["gather", "load"])
    def test_lookups_agree_in_every_bit(self, family: str, lookup: str) -> None:
        w, _ = make_weight("nf4", 48, 256)
        x = normal(5, 256).bfloat16().to(DEVICE)
        plan = Plan(family, rows=8 if family == "split" else 16, columns=32, lookup="permute")
        default = quant.matmul(x, w, plan=plan)
        assert torch.equal(quant.matmul(x, w, plan=dataclasses.replace(plan, lookup=lookup)), default)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format_", FORMATS)
    def test_library(self, format_: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tiles, "LIBRARY_TILE", 192 * 20)  # several parts
        self.check(format_, 5, 50, 256, dtype, plan=Plan("library"))
        assert dispatch.launches[f"{format_[:4].rstrip('-')}.dequantize.triton"] > 1

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format_", FORMATS)
    def test_dequantised_parts_equal_the_reference(self, format_: str, dtype: torch.dtype) -> None:
        from loraplex_kernels.quant.launch import dequantize

        w, dense = make_weight(format_, 90, 128)
        for first, last in ((0, 90), (7, 80), (64, 65)):
            found, wanted = dequantize(w, dtype, first, last).cpu(), dense[first:last].float().to(dtype)
            if format_ == "nf4-double":  # whose scales a GPU makes with one rounding less
                torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
            else:
                assert torch.equal(found, wanted)

    @pytest.mark.parametrize("format_", ["nf4", "int4-64"])
    @pytest.mark.parametrize("rows", [1, 16])
    def test_bf16_errs_no_more_than_dense_bf16_weights(self, format_: str, rows: int) -> None:
        """The measure is a product with the weight rounded to bf16, as transformers computes it."""
        w, dense = make_weight(format_, 64, 2048)
        x = normal(rows, 2048).bfloat16()
        exact = x.double() @ dense.T
        common = (x.double() @ dense.bfloat16().double().T).bfloat16().double() - exact
        error = quant.matmul(x.to(DEVICE), w).cpu().double() - exact
        assert error.norm() <= 1.1 * common.norm()

    def test_same_input_same_bits(self) -> None:
        w, _ = make_weight("nf4", 64, 640)
        x = normal(12, 640).bfloat16().to(DEVICE)
        plan = Plan("tile", rows=16, columns=64, planes=4)
        first = quant.matmul(x, w, plan=plan)
        assert torch.equal(quant.matmul(x, w, plan=plan), first)

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_siblings_in_one_launch(self, double_quant: bool) -> None:
        parts = [
            nf4.quantize(normal(rows, 256, seed=rows), double_quant=double_quant) for rows in (128, 64, 40)
        ]
        joined = quant.arrange_nf4(parts).to(DEVICE)
        x = normal(9, 256)
        y = quant.matmul(x.to(DEVICE), joined).cpu()
        assert dispatch.launches == {"nf4.matmul.triton": 1}
        exact = torch.cat([x.double() @ nf4.dequantize(part).double().T for part in parts], dim=1)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)

    def test_leading_dimensions_and_strides(self) -> None:
        w, dense = make_weight("nf4", 24, 128)
        x = normal(128, 6).t().view(2, 3, 128).to(DEVICE)  # columns contiguous
        y = quant.matmul(x, w)
        assert y.shape == (2, 3, 24)
        torch.testing.assert_close(y.cpu().double(), x.cpu().double() @ dense.T, rtol=1e-5, atol=1e-4)
        assert quant.matmul(x[:, :0], w).shape == (2, 0, 24)

    @pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
    @pytest.mark.parametrize("format_", FORMATS)
    @pytest.mark.parametrize("rows", [1, 16, 64])
    def test_replayed_from_a_graph(self, format_: str, rows: int) -> None:
        w, _ = make_weight(format_, 512, 1024)
        x = normal(rows, 1024).bfloat16().to(DEVICE)
        eager = quant.matmul(x, w)
        graph = torch.cuda.CUDAGraph()
        static = torch.zeros_like(x)
        with torch.cuda.graph(graph):
            y = quant.matmul(static, w)
        static.copy_(x)
        graph.replay()
        assert torch.equal(y, eager)

    @pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
    @pytest.mark.parametrize("format_", FORMATS)
    @pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128, 512])
    def test_shapes_of_a_large_model(self, format_: str, rows: int) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            self.check(format_, rows, 4096, 4096, dtype)

    @pytest.mark.kernels_wide
    @pytest.mark.parametrize("seed", range(150))
    def test_wide_sweep(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def among(choices: list[int]) -> int:
            return choices[int(torch.randint(len(choices), (1,), generator=generator))]

        format_ = FORMATS[seed % len(FORMATS)]
        dtype = DTYPES[seed // len(FORMATS) % 3]
        step = group_of(format_) if format_.startswith("int4") else 64
        k = step * among([1, 2, 3, 5, 9])
        n, rows = among([1, 16, 47, 128, 201]), among([1, 2, 8, 9, 31, 64, 77, 140])
        plan: Plan | None = None
        if seed % 2:
            choose: list[Callable[[], Plan]] = [
                lambda: Plan(
                    "split", rows=among([4, 8, 16]), columns=among([16, 64]), warps=among([2, 4, 8])
                ),
                lambda: Plan(
                    "tile",
                    rows=among([16, 64]),
                    columns=among([32, 128]),
                    unroll=among([1, 2]),
                    planes=among([1, 2, 3, 4]),
                    lookup=["load", "gather"][among([0, 1])],
                ),
            ]
            plan = choose[seed // 2 % 2]()
        self.check(format_, rows, n, k, dtype, plan=plan, bias=seed % 3 > 0, seed=seed)


class TestResidentWeights:
    """The weights that the server holds for a group of siblings where the kernels run."""

    __test__ = RUNS_HERE

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("quantization", ["nf4", "int4"])
    @pytest.mark.parametrize("width", [256, 96])
    def test_siblings_share_a_launch_where_they_can(
        self, quantization: str, width: int, double_quant: bool
    ) -> None:
        from loraplex_server.model.layers.weights import WeightFormat

        siblings = [normal(rows, width, seed=rows).to(DEVICE) for rows in (128, 64, 30)]
        form = WeightFormat(quantization, torch.float32, torch.device(DEVICE), double_quant)
        x = normal(4, width).to(DEVICE)
        with dispatch.using("torch"):
            truth = torch.cat([weight.matmul(x, None) for weight in form.freeze(siblings)], dim=1)
        with dispatch.using("triton"):
            dispatch.launches.clear()
            held = form.freeze(siblings)
            found = torch.cat([weight.matmul(x, None) for weight in held], dim=1)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
        if quantization == "nf4" and width % 64:
            assert not dispatch.launches, "left to the library"
        else:
            assert dispatch.launches == {f"{quantization}.matmul.triton": 1}
            assert set(held[0].tensors()) >= {"codes", "scale"}
