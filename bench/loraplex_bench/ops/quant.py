"""Products with 4-bit weights beside dense ones, gemlite's (int4) and bitsandbytes' (nf4).

- `quant`         on a GPU, at the shapes of a Llama-3-8B, beside cuBLAS in bf16
- `bitsandbytes`  the same beside bitsandbytes, which brings a CUDA library along: in a process of its own
- `quant-cpu`     what a server on a CPU has to choose from
- `quant-plans`   every plan of the GPU kernels that is worth trying, the fastest first
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex_bench.ops.registry import Contender, Last, Op, Setting, unavailable
from loraplex_bench.ops.timers import Call
from loraplex_bench.peers.quant_layers import (
    bitsandbytes_dequantize,
    bitsandbytes_multiply,
    bitsandbytes_nf4,
    gemlite_layer,
)
from loraplex_kernels import dense, quant
from loraplex_kernels.quant import BlockedWeight, PackedInt4Weight, Plan, cpu_packed, int4, nf4, tiles

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
SHAPES = {"o": (4096, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(output width, input width) of a Llama-3-8B's projections, siblings as one."""

CPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
CPU_SHAPES = {"square": (4096, 4096), "small": (768, 2048)}

_GROUP = 128
# Where the streaming multiprocessors cannot be asked for: those of an H100.
_PROCESSORS = 132


@dataclass(frozen=True)
class Case:
    """One row: x ``[rows, k]`` times a weight ``[n, k]``. `product`: of a plan, whose."""

    site: str
    n: int
    k: int
    rows: int
    product: str = ""

    def __str__(self) -> str:
        return f"{f'{self.product} ' if self.product else ''}{self.site} {self.n}x{self.k}, {self.rows} rows"


def cases() -> list[Case]:
    """All rows of a site, then the next."""
    return [Case(site, n, k, rows) for site, (n, k) in SHAPES.items() for rows in ROWS]


def cpu_cases() -> list[Case]:
    return [Case(site, n, k, rows) for site, (n, k) in CPU_SHAPES.items() for rows in CPU_ROWS]


def plan_cases() -> list[Case]:
    """Each of nf4 and int4 at every site, all rows of it together."""
    return [
        Case(site, n, k, rows, name)
        for site, (n, k) in SHAPES.items()
        for name in ("nf4", "int4")
        for rows in ROWS
    ]


_TINY = Case("o", n=64, k=128, rows=5)
TINY = [dataclasses.replace(_TINY, rows=1), _TINY, Case("down", n=32, k=256, rows=5)]
TINY_PLANS = [dataclasses.replace(_TINY, product=name) for name in ("nf4", "int4")]


def _no_note(weight: Any, rows: int) -> str:
    return ""


@dataclass(frozen=True)
class Format:
    """One way to hold a weight and to multiply by it.

    Attributes:
        make: from the dense weight, float32 ``[N, K]``.
        multiply: x in the setting's dtype, and the result in any.
        dequantize: the numbers that it stands for, float32.
        num_bytes: what a product reads of it.
        copied: another one with memory of its own; None: make it anew.
        note: of the weight and a number of rows.
    """

    make: Callable[[Tensor], Any]
    multiply: Callable[[Any, Tensor], Tensor]
    dequantize: Callable[[Any], Tensor]
    num_bytes: Callable[[Any], int] = lambda weight: int(weight.nbytes)
    copied: Callable[[Any], Any] | None = copy.deepcopy
    note: Callable[[Any, int], str] = _no_note
    own: bool = True


class Weights:
    """One weight in every format, each made when it is first asked for, in copies that keep it cold."""

    def __init__(self, n: int, k: int, setting: Setting) -> None:
        self._setting = setting
        generator = torch.Generator(setting.device).manual_seed(0)
        self.dense = torch.randn((n, k), generator=generator, device=setting.device) * 0.02
        self._held: dict[str, list[Any]] = {}

    def copies(self, name: str, held: Format) -> list[Any]:
        """At least two."""
        if name not in self._held:
            first = held.make(self.dense)
            others = range(self._setting.copies(held.num_bytes(first)) - 1)
            copied = held.copied or (lambda _: held.make(self.dense))
            self._held[name] = [first, *(copied(first) for _ in others)]
        return self._held[name]


_weights = Last(Weights)


def blocked(name: str, weight: Tensor) -> BlockedWeight:
    """As the GPU kernels read it: "nf4", "nf4-double" or "int4"."""
    if name == "int4":
        return quant.arrange_int4(int4.quantize(weight, group=_GROUP))
    return quant.arrange_nf4([nf4.quantize(weight, double_quant=name == "nf4-double")])


def multiply_blocked(weight: BlockedWeight, x: Tensor, plan: Plan | None = None) -> Tensor:
    return quant.matmul(x, weight, plan=plan)


def chosen_plan(weight: BlockedWeight, rows: int) -> str:
    """The plan that the kernels choose by themselves."""
    processors = _PROCESSORS
    if weight.device.type == "cuda":
        processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
    return describe(tiles.choose(rows, weight.shape[0], weight.blocks, torch.bfloat16, processors))


def describe(plan: Plan) -> str:
    """A plan in a few characters, for the table."""
    if plan.family == "library":
        return "library"
    return (
        f"{plan.family} {plan.rows}x{plan.columns} w{plan.warps} s{plan.stages} u{plan.unroll} "
        f"p{plan.planes} {plan.lookup}"
    )


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight)


def _of_blocked(name: str, multiply: Callable[[Any, Tensor], Tensor] | None = None) -> Format:
    return Format(
        functools.partial(blocked, name),
        multiply or (lambda weight, x: multiply_blocked(weight, x)),
        lambda weight: quant.dequantize(weight, torch.float32),
        note=chosen_plan if multiply is None else _no_note,
    )


_CUBLAS = Format(Tensor.bfloat16, _linear, Tensor.float, own=False)
_BITSANDBYTES = Format(
    lambda weight: bitsandbytes_nf4(weight.bfloat16()),
    bitsandbytes_multiply,
    bitsandbytes_dequantize,
    # A float32 scale for 64 weights beside the codes.
    lambda weight: int(weight[0].nbytes * 9 // 8),
    note=lambda weight, rows: _version("bitsandbytes"),
)


@dataclass(frozen=True)
class _Gemlite:
    """A layer of gemlite's, and the weight that it was made from."""

    affine: int4.Int4Weight
    layer: Any

    @classmethod
    def of(cls, weight: Tensor) -> _Gemlite:
        affine = int4.quantize(weight, group=_GROUP)
        return cls(affine, gemlite_layer(affine))


FORMATS: dict[str, Format] = {
    "cublas-bf16": _CUBLAS,
    **{name: _of_blocked(name) for name in ("nf4", "int4", "nf4-double")},
    "gemlite-int4": Format(
        _Gemlite.of,
        lambda weight, x: weight.layer(x),
        lambda weight: int4.dequantize(weight.affine),
        lambda weight: int(weight.affine.packed.nbytes + 4 * weight.affine.scale.numel()),
        copied=None,
        note=lambda weight, rows: _version("gemlite"),
        own=False,
    ),
}


def cpu_formats(case: Case, setting: Setting) -> dict[str, Format]:
    """Those that fit the case's width and this processor."""

    def packed(multiply: Callable[[Tensor, PackedInt4Weight], Tensor]) -> Format:
        return Format(
            lambda weight: PackedInt4Weight.from_int4(int4.quantize(weight)),
            lambda weight, x: multiply(x, weight),
            cpu_packed.dequantize,
        )

    found = {
        "dense fp32 (torch)": Format(Tensor.clone, _linear, Tensor.float, own=False),
        "dense bf16": _CUBLAS,
        "dense fp32 (loraplex)": Format(
            Tensor.clone, lambda weight, x: dense.linear(x, weight), Tensor.float
        ),
        "nf4": Format(nf4.quantize, lambda weight, x: nf4.matmul(x, weight), nf4.dequantize),
        "nf4 double quant": Format(
            functools.partial(nf4.quantize, double_quant=True),
            lambda weight, x: nf4.matmul(x, weight),
            nf4.dequantize,
        ),
        "int4 fp32": Format(int4.quantize, lambda weight, x: int4.matmul(x, weight), int4.dequantize),
    }
    if cpu_packed.supported((case.n, case.k), int4.choose_group(case.k)):
        found["int4 packed, as chosen"] = packed(cpu_packed.matmul)
        found["int4 packed, torch's kernel"] = packed(cpu_packed.matmul_packed)
        if cpu_packed.layout_block() is not None:
            found["int4 packed, tiled"] = packed(cpu_packed.matmul_tiled)
    return {**found, "bitsandbytes nf4": dataclasses.replace(_BITSANDBYTES, own=False)}


def plan_formats(case: Case, setting: Setting) -> dict[str, Format]:
    """The case's product by each candidate."""
    return {
        describe(plan): _of_blocked(case.product, functools.partial(multiply_blocked, plan=plan))
        for plan in candidates(case.rows)
    }


def candidates(rows: int) -> Iterator[Plan]:
    """Plans worth trying for a number of rows, for a table measured rather than reasoned."""
    if rows <= 16:
        for columns, warps, stages in itertools.product((16, 32, 64), (4, 8), (3, 4, 5)):
            yield Plan("split", max(8, rows), columns, warps, stages)
    if rows <= 64:
        height = max(16, 1 << (rows - 1).bit_length())
        for columns, planes, unroll in itertools.product((64, 128), (1, 2, 4, 8), (1, 2)):
            yield Plan("tile", height, columns, warps=4, stages=4, unroll=unroll, planes=planes)
        yield Plan("tile", height, 128, warps=8, stages=3, planes=4)
        yield Plan("tile", height, 128, warps=4, stages=4, unroll=2, planes=4, lookup="gather")
    elif rows < 4096:
        for height, planes in itertools.product((64, 128), (1, 2, 4)):
            yield Plan("tile", height, 128, warps=8, stages=3, planes=planes)
        yield Plan("tile", 64, 128, warps=4, stages=4)
        yield Plan("library")


Formats = Callable[[Case, Setting], Mapping[str, Format]]


def _prepare(formats: Formats, case: Case, setting: Setting) -> Iterator[Contender]:
    """A contender for each format."""
    weights = _weights(case.n, case.k, setting)
    dtype = torch.bfloat16 if setting.device.type == "cuda" else setting.dtype
    x = torch.randn(case.rows, case.k, device=setting.device).to(dtype)
    for name, held in formats(case, setting).items():
        # Plans of one product share its weight.
        key = case.product or name
        try:
            first = weights.copies(key, held)[0]
        except Exception as problem:
            yield unavailable(name, problem, "own" if held.own else "peer")
            continue
        yield Contender(
            name,
            functools.partial(_calls, weights, key, held, x),
            functools.partial(_product, held, first, x),
            functools.partial(_exact, held, first, x),
            held.num_bytes(first) + 2 * case.rows * (case.n + case.k),
            2.0 * case.rows * case.n * case.k,
            "own" if held.own else "peer",
            held.note(first, case.rows),
        )


def _calls(weights: Weights, key: str, held: Format, x: Tensor) -> list[Call]:
    return [functools.partial(held.multiply, weight, x) for weight in weights.copies(key, held)]


def _product(held: Format, weight: Any, x: Tensor) -> list[Tensor]:
    return [held.multiply(weight, x)]


def _exact(held: Format, weight: Any, x: Tensor) -> list[Tensor]:
    return [x.float() @ held.dequantize(weight).t()]


def _version(package: str) -> str:
    return f"{package} {getattr(sys.modules.get(package), '__version__', '?')}"


def _op(name: str, formats: Formats, **parts: Any) -> Op:
    return Op(name, prepare=functools.partial(_prepare, formats), **parts)


OPS = (
    _op("quant", lambda case, setting: FORMATS, cases={"cuda": cases}, tiny=TINY),
    _op(
        "bitsandbytes",
        lambda case, setting: {"cublas-bf16": _CUBLAS, "bitsandbytes-nf4": _BITSANDBYTES},
        cases={"cuda": cases},
        tiny=TINY,
    ),
    _op("quant-cpu", cpu_formats, cases={"cpu": cpu_cases}, tiny=TINY),
    _op("quant-plans", plan_formats, cases={"cuda": plan_cases}, tiny=TINY_PLANS, best=4),
)
