"""The torch LoRA op, specification and CPU path, against a float64 oracle that goes token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from loraplex_kernels import dispatch, lora
from loraplex_kernels.lora import gather, reference
from loraplex_kernels.pool import LoraBatch, LoraSite

Apply = Callable[..., None]

MIXED = [(6, 7, 1), (0, 16, 4), (12, 0, 0), (0, 0, 0), (32, 14, 8), (3, 128, 64), (1, 1, 1), (64, 5, 24)]


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    with dispatch.using("torch"):
        yield


@pytest.fixture(params=["specification", "public op"])
def apply(request: pytest.FixtureRequest) -> Apply:
    return reference.apply if request.param == "specification" else lora.apply


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "in_features", "widths", "longest"),
    [
        (1, 64, (64, 32, 32), 1),
        (17, 96, (96, 32, 32), 2),
        (40, 64, (128, 128), 3),
        (64, 33, (47, 33, 70), 4),
        (100, 128, (64,), 40),
        (257, 80, (160, 32, 64), 60),
    ],
)
def test_random_batches(
    lora_case: Any,
    apply: Apply,
    dtype: torch.dtype,
    tokens: int,
    in_features: int,
    widths: tuple[int, ...],
    longest: int,
) -> None:
    ranks = [slot_ranks[: len(widths)] for slot_ranks in MIXED]
    runs = lora_case.random_runs(tokens, tokens, len(ranks), longest) or [(0, tokens, ((0, 1.0),))]
    if not any(adapters for _, _, adapters in runs):
        runs = [(0, tokens, ((0, 1.0), (4, -0.5)))]
    case = lora_case(
        in_features=in_features, widths=widths, ranks=ranks, runs=runs, num_tokens=tokens + 2, dtype=dtype
    )
    case.run(apply)
    case.check()


@pytest.mark.parametrize("distinct", [1, 5, 64])
def test_decode_with_many_adapters(lora_case: Any, apply: Apply, distinct: int) -> None:
    ranks = [(1 + 2 * slot, 8, 6) for slot in range(distinct)]
    runs = [(token, token + 1, ((token * 7 % distinct, 1.0),)) for token in range(64)]
    case = lora_case(
        in_features=64, widths=(64, 32, 32), ranks=ranks, runs=runs, num_tokens=64, dtype=torch.float32
    )
    case.run(apply)
    case.check()


def test_the_cpu_path_takes_both_roads(lora_case: Any) -> None:
    few, many = (0, 3, ((0, 1.0),)), (3, 40, ((1, 0.5), (2, 1.0)))
    arguments = {"in_features": 64, "ranks": [(6,), (4,), (12,)], "num_tokens": 40, "dtype": torch.float32}
    case = lora_case(widths=(64,), runs=[few, many], **arguments)
    kinds = [type(part).__name__ for part in gather._plan(case.pool, case.site, case.batch)]
    assert sorted(kinds) == ["_Bags", "_Product"]
    odd_width = lora_case(widths=(37,), runs=[few, many], **arguments)
    narrow = lora_case(widths=(31,), runs=[few, many], **arguments)
    for case, bags in ((odd_width, 1), (narrow, 0)):
        kinds = [type(part).__name__ for part in gather._plan(case.pool, case.site, case.batch)]
        assert kinds.count("_Bags") == bags
        case.run()
        case.check()


def test_decodes_and_a_chunk_of_one_adapter_take_roads_of_their_own(lora_case: Any) -> None:
    runs = [(0, 2, ((0, 1.0),)), (2, 3, ((1, 2.0),)), (5, 40, ((0, 0.5),)), (40, 41, ((1, 1.0),))]
    case = lora_case(
        in_features=64, widths=(64, 32), ranks=[(6, 5), (4, 0)], runs=runs, num_tokens=44, dtype=torch.float32
    )
    bags, product = gather._plan(case.pool, case.site, case.batch)
    assert isinstance(bags, gather._Bags)
    assert isinstance(product, gather._Product)
    assert product.tokens == slice(5, 40)
    case.run(lora.apply)
    case.check()


def test_rows_that_do_not_align(lora_case: Any) -> None:
    case = lora_case(
        in_features=601,
        widths=(257, 263),
        ranks=[(6, 7), (12, 3)],
        runs=[(0, 2, ((0, 1.0),)), (2, 4, ((1, 1.0), (0, 2.0)))],
        num_tokens=4,
        dtype=torch.float32,
    )
    assert case.pool.host.a_offset[0, case.first_entry + 1] % 601
    case.run()
    case.check()


def test_columns_between_slices_stay(lora_case: Any, apply: Apply) -> None:
    case = lora_case(
        in_features=64,
        widths=(64, 32),
        gap=5,
        ranks=[(6, 7), (12, 3)],
        runs=[(0, 2, ((0, 1.0),)), (2, 14, ((1, 1.0), (0, 2.0)))],
        num_tokens=14,
        dtype=torch.float32,
    )
    case.run(apply)
    case.check()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_stays_with_its_tenant(
    lora_case: Any, apply: Apply, rows: int, value: float
) -> None:
    runs = [(0, rows, ((0, 1.0),)), (rows, 2 * rows, ((1, 1.0),)), (2 * rows, 3 * rows, ((2, 1.0),))]
    case = lora_case(
        in_features=64,
        widths=(64, 32),
        ranks=[(8, 8), (8, 8), (16, 4)],
        runs=runs,
        num_tokens=3 * rows,
        dtype=torch.float32,
    )
    case.pool.a(1, case.first_entry, 64).fill_(value)
    case.pool.b(1, case.first_entry + 1, 32).fill_(value)
    case.run(apply)
    assert not case.y[rows : 2 * rows].isfinite().any()
    exact, tolerance = case.oracle()
    others = [*range(rows), *range(2 * rows, 3 * rows)]
    assert ((case.y.double() - exact).abs() <= tolerance)[others].all()


def test_order_of_a_composition_decides_the_sum(lora_case: Any, apply: Apply) -> None:
    arguments = {
        "in_features": 64,
        "widths": (64,),
        "ranks": [(8,), (16,), (4,)],
        "num_tokens": 3,
        "dtype": torch.float32,
    }
    forward = lora_case(runs=[(0, 3, ((0, 1.0), (1, 0.7), (2, -2.0)))], **arguments)
    again = lora_case(runs=[(0, 3, ((0, 1.0), (1, 0.7), (2, -2.0)))], **arguments)
    backward = lora_case(runs=[(0, 3, ((2, -2.0), (1, 0.7), (0, 1.0)))], **arguments)
    for case in (forward, again, backward):
        case.run(apply)
        case.check()
    assert torch.equal(forward.y, again.y)


def test_a_plan_follows_the_slots(lora_case: Any) -> None:
    case = lora_case(
        in_features=64,
        widths=(64,),
        ranks=[(8,), (6,)],
        runs=[(0, 2, ((0, 1.0),)), (2, 20, ((1, 1.0),))],
        num_tokens=20,
        dtype=torch.float32,
    )
    case.run()
    case.check()
    case.pool.clear(0)
    case.matrices.pop((0, 0))
    case.y_buffer.copy_(case.before)
    case.run()
    case.check()
    assert torch.equal(case.y[:2], case.before[:2, 8:72])


def test_two_steps_equal_one(lora_case: Any) -> None:
    runs = [(0, 2, ((0, 1.0),)), (2, 20, ((1, 1.0), (0, 0.5)))]
    case = lora_case(
        in_features=64, widths=(64, 32), ranks=[(8, 3), (6, 0)], runs=runs, num_tokens=20, dtype=torch.float32
    )
    dispatch.launches.clear()
    h = lora.shrink(case.x, case.pool, case.site, case.batch)
    lora.expand(h, case.pool, case.site, case.batch, case.y)
    case.check()
    assert dispatch.launches == {"lora.shrink.torch": 1, "lora.expand.torch": 1}
    case.y_buffer.copy_(case.before)
    case.run()
    case.check()
    assert dispatch.launches["lora.apply.torch"] == 1


def test_misfits_are_named(lora_case: Any) -> None:
    case = lora_case(
        in_features=64,
        widths=(64,),
        ranks=[(8,)],
        runs=[(0, 4, ((0, 1.0),))],
        num_tokens=4,
        dtype=torch.float32,
    )
    empty = LoraBatch.build([(0, 4, ())])
    assert empty.num_pairs == 0
    good = {"x": case.x, "y": case.y, "pool": case.pool, "site": case.site, "batch": case.batch}
    wrong: list[tuple[str, dict[str, object]]] = [
        ("no pair", {"batch": empty}),
        (r"x must be \[T, 64\]", {"x": case.x[:, :63]}),
        (r"y must be \[T, 64 or more\]", {"y": case.y[:, :63]}),
        ("x has 3 rows", {"x": case.x[:3]}),
        ("y must have contiguous rows", {"y": case.y.T.contiguous().T}),
        ("x must be torch.float32", {"x": case.x.double()}),
        ("entries end at", {"site": LoraSite(9, 64, ((0, 64),))}),
    ]
    for message, change in wrong:
        with pytest.raises(ValueError, match=message):
            lora.apply(**{**good, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slices"):
        LoraSite(0, 64, ((0, 64), (32, 64)))


def test_triton_on_cpu_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    with dispatch.using("auto"):
        assert dispatch.backend(cpu) == "torch"
    with dispatch.using("triton"), pytest.raises(dispatch.KernelUnavailableError, match="TRITON_INTERPRET=1"):
        dispatch.backend(cpu)
    with pytest.raises(ValueError, match="auto, torch, triton"):
        dispatch.set_kernels("cuda")  # type: ignore[arg-type]
    assert dispatch.get_kernels() == "torch"
