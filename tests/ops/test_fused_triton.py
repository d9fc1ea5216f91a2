"""The fused kernels against their references: natively on CUDA, else through Triton's interpreter.

float32 and float16 results are the reference's but for the order of sums and the last bit of exponentials.
The interpreter cuts bfloat16 off where a GPU rounds it, so there each rounding may be off by one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.attention import AttentionBatch, kv_cache_shape
from loraplex_kernels.attention.rotary import rotate_and_write
from loraplex_kernels.gated import ACTIVATIONS, Activation, gated
from loraplex_kernels.norm import Form, RmsNorm, add_rms_norm, rms_norm

INTERPRETED = dispatch.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_HERE = dispatch.triton_installed() and (INTERPRETED or torch.cuda.is_available())
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
def test_under_the_interpreter(under_the_interpreter: Callable[..., None]) -> None:
    under_the_interpreter(__file__, "not kernels_wide", "TestKernels")


def check(found: Tensor, wanted: Tensor, scale: Tensor, roundings: int = 2, equal: float = 0.99) -> None:
    """Within one bit for each rounding, of `scale`; and in most places, where rounding is right, equal."""
    assert (found.shape, found.dtype, found.is_contiguous()) == (wanted.shape, wanted.dtype, True)
    epsilon = torch.finfo(wanted.dtype).eps
    error = (found.double() - wanted.double()).abs()
    worst = (error / (roundings * epsilon * scale.double() + 1e-30)).nan_to_num(nan=float("inf")).max()
    assert worst <= 1, f"an error is {worst} times the tolerance"
    if wanted.dtype == HALF:
        assert (found == wanted).double().mean() > equal


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
class TestKernels:
    __test__ = RUNS_HERE

    @pytest.fixture(autouse=True)
    def counted(self) -> Iterator[None]:
        dispatch.launches.clear()
        with dispatch.using("triton"):
            yield

    @pytest.fixture
    def draw(self) -> Callable[..., Tensor]:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)

        return normal

    @pytest.mark.parametrize(
        ("rows", "width", "form", "after", "dtype"),
        [
            (1, 64, "rounded", None, HALF),
            (5, 96, "offset", "offset", HALF),
            (3, 1000, "single", None, HALF),
            (2, 2304, "rounded", "single", HALF),
            (33, 7, "single", "rounded", SINGLE),
            (2, 4097, "offset", "offset", SINGLE),
            (4, 1, "rounded", None, SINGLE),
            (3, 896, "rounded", None, BRAIN),
            (2, 3584, "offset", "offset", BRAIN),
        ],
    )
    def test_sums_and_norms(
        self,
        rows: int,
        width: int,
        form: Form,
        after: Form | None,
        dtype: torch.dtype,
        draw: Callable[..., Tensor],
    ) -> None:
        x, residual = draw(rows, width, dtype=dtype, scale=3), draw(rows, width, dtype=dtype, scale=5)
        norm = RmsNorm(draw(width, dtype=dtype), 1e-6, form)
        first = None if after is None else RmsNorm(draw(width, dtype=dtype), 1e-5, after)
        total, normed = add_rms_norm(x, residual, norm, after=first)
        alone = rms_norm(x, norm)
        assert dispatch.launches == {"norm.add_rms.triton": 1, "norm.rms.triton": 1}
        with dispatch.using("torch"):
            wanted_total, wanted = add_rms_norm(x, residual, norm, after=first)
            wanted_alone = rms_norm(x, norm)
        added = x if first is None else wanted_total - residual
        size = residual.double().abs() + added.double().abs()
        check(total, wanted_total, size, 4)
        # An error of the sum comes out as large as the norm makes it.
        stretch = wanted.double().abs() / wanted_total.double().abs().clamp_min(1e-6)
        check(normed, wanted, wanted.double().abs() + stretch * size, 6)
        check(alone, wanted_alone, wanted_alone.double().abs(), 4)

    def test_norms_of_heads_where_a_projection_left_them(self, draw: Callable[..., Tensor]) -> None:
        """Of 3 heads beside 2 of another kind, all in one row for each token: a view, and no copy."""
        packed = draw(1, 6, 5 * 16, dtype=HALF)
        x = packed[..., : 3 * 16].view(1, 6, 3, 16)
        packed[..., 3 * 16 :] = torch.nan
        norm = RmsNorm(draw(16, dtype=HALF), 1e-6, "rounded")
        found = rms_norm(x, norm)
        with dispatch.using("torch"):
            wanted = rms_norm(x, norm)
        check(found, wanted, wanted.abs())

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize(("rows", "width", "dtype"), [(3, 96, HALF), (2, 1100, SINGLE), (2, 1024, BRAIN)])
    def test_gates(
        self, activation: Activation, rows: int, width: int, dtype: torch.dtype, draw: Callable[..., Tensor]
    ) -> None:
        """Both parts are columns of one packed row; what surrounds them is neither read nor written."""
        packed = draw(1, rows, 2 * width + 8, dtype=dtype, scale=4)
        packed[..., 2 * width :] = torch.nan
        packed[0, 0, :5] = torch.tensor([0.0, -100.0, 100.0, -0.0, torch.inf])
        before = packed.clone()
        gate, up = packed[..., :width], packed[..., width : 2 * width]
        found = gated(gate, up, activation)
        assert dispatch.launches == {"gated.triton": 1}
        assert torch.equal(packed.nan_to_num(), before.nan_to_num())
        with dispatch.using("torch"):
            wanted = gated(gate, up, activation)
        assert found[0, 0, 4].isinf()
        found[0, 0, 4] = wanted[0, 0, 4] = 1.0
        # Near -5 torch's own sum of 1 and a number close to -1 has lost most digits.
        info = torch.finfo(dtype)
        lost = 4 * up.abs().float() * (torch.finfo(SINGLE).eps / info.eps)
        check(found, wanted, wanted.abs() + lost + info.smallest_normal, 3, equal=0.9)

    @pytest.mark.parametrize(
        ("heads", "head_dim", "rotary", "dtype", "cache_dtype"),
        [
            ((4, 2), 16, 16, HALF, HALF),
            ((3, 1), 80, 32, SINGLE, SINGLE),
            ((5, 5), 96, 96, HALF, SINGLE),
            ((20, 3), 128, 128, SINGLE, SINGLE),
            ((4, 4), 6, 2, HALF, HALF),
            ((4, 2), 32, 24, BRAIN, BRAIN),
            ((4, 2), 16, 16, HALF, torch.float8_e4m3fn),
        ],
    )
    def test_rotations_and_writes(
        self,
        heads: tuple[int, int],
        head_dim: int,
        rotary: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        draw: Callable[..., Tensor],
    ) -> None:
        """Of a packed projection's heads."""
        tokens = 5
        batch = AttentionBatch.build(
            [0, 1, 5], [1, 4], [0, 1, 4], [3, 0, 1, 2], [7, 0, 5, 13, 2], block_size=4, device=DEVICE
        )
        total = heads[0] + 2 * heads[1]
        packed = draw(tokens, total * head_dim, dtype=dtype, scale=3)
        angle = draw(tokens, rotary, dtype=SINGLE, scale=3)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        if cache_dtype.itemsize == 1:
            # What has to be rounded to 8 bits the interpreter sometimes halves; so nothing has to be.
            packed = packed.to(cache_dtype).to(dtype)
            packed[1, -1] = 1000.0
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        shape = kv_cache_shape(4, 4, heads[1], head_dim)
        empty = draw(*shape, dtype=SINGLE).to(cache_dtype)
        results = []
        for kernels in ("triton", "torch"):
            rows, cache = packed.clone(), empty.clone()
            q, k, v = (
                part.view(tokens, -1, head_dim)
                for part in rows.split([heads[0] * head_dim, *[heads[1] * head_dim] * 2], dim=1)
            )
            with dispatch.using(kernels):
                rotate_and_write(q, k, v, cos, sin, cache, batch)
            results.append((q.contiguous(), k, v, cache))
        assert dispatch.launches["rotary.write.triton"] == 1
        (q, k, v, cache), (wanted_q, own_k, own_v, wanted_cache) = results
        assert torch.equal(k, own_k), "keys are rotated in the cache alone"
        assert torch.equal(v, own_v)
        exact = dtype in (SINGLE, HALF) and INTERPRETED
        size = packed.abs().max().float().expand(q.shape)
        check(q, wanted_q, size, 0 if exact else 3)
        assert torch.equal(q, packed[:, : heads[0] * head_dim].reshape(q.shape)) == (not sin.any())
        found, wanted, before = cache.float(), wanted_cache.float(), empty.float()
        assert torch.equal(found == before, wanted == before), "wrong cells were written"
        tolerance = (0 if exact else 3) * torch.finfo(dtype).eps * size.max()
        bad = (found - wanted).abs() > tolerance
        assert not bad.any(), (found[bad], wanted[bad])

    def test_a_token_without_a_cell_is_written_nowhere(self, draw: Callable[..., Tensor]) -> None:
        q, k, v = (draw(3, heads, 16, dtype=HALF) for heads in (4, 2, 2))
        cos, sin = draw(3, 16, dtype=HALF), draw(3, 16, dtype=HALF)
        caches = []
        for last in (3, -1):
            batch = AttentionBatch.build([0, 3], [3], [0, 1], [0], [1, 2, 3], block_size=4, device=DEVICE)
            batch.slots[-1] = last
            caches.append(torch.zeros(kv_cache_shape(2, 4, 2, 16), dtype=HALF, device=DEVICE))
            rotate_and_write(q.clone(), k, v, cos, sin, caches[-1], batch)
        whole, without = caches
        assert whole[0, :, :, 3].all()
        whole[0, :, :, 3] = 0
        assert torch.equal(whole, without)


class TestChecks:
    """Arguments that do not fit are refused with any kernels."""

    def test_norms(self) -> None:
        norm = RmsNorm(torch.ones(8), 1e-6, "rounded")
        with pytest.raises(ValueError, match=r"weight is \(8,\) in torch.float32"):
            rms_norm(torch.ones(2, 9), norm)
        with pytest.raises(ValueError, match="bfloat16"):
            rms_norm(torch.ones(2, 8, dtype=BRAIN), norm)
        with pytest.raises(ValueError, match="one shape and dtype"):
            add_rms_norm(torch.ones(2, 8), torch.ones(3, 8), norm)
        with pytest.raises(ValueError, match="form must be one of"):
            rms_norm(torch.ones(2, 8), RmsNorm(torch.ones(8), 1e-6, "other"))
        assert rms_norm(torch.ones(0, 8), norm).shape == (0, 8)

    def test_gates(self) -> None:
        with pytest.raises(ValueError, match="activation must be one of"):
            gated(torch.ones(2, 8), torch.ones(2, 8), "relu")
        with pytest.raises(ValueError, match="one shape and dtype"):
            gated(torch.ones(2, 8), torch.ones(2, 9), "silu")

    def test_rotations(self) -> None:
        batch = AttentionBatch.build([0, 2], [2], [0, 1], [0], [0, 1], block_size=4, device="cpu")
        cache = torch.zeros(kv_cache_shape(1, 4, 2, 8))
        q, k, angle = torch.ones(2, 4, 8), torch.ones(2, 2, 8), torch.ones(2, 8)
        with pytest.raises(ValueError, match="do not fit a step of 2 tokens"):
            rotate_and_write(q[:1], k, k, angle, angle, cache, batch)
        for wrong in (torch.ones(2, 7), torch.ones(2, 10), torch.ones(1, 8)):
            with pytest.raises(ValueError, match="an even number up to 8"):
                rotate_and_write(q, k, k, wrong, wrong, cache, batch)
        with pytest.raises(ValueError, match="one dtype"):
            rotate_and_write(q, k, k, angle.double(), angle, cache, batch)
