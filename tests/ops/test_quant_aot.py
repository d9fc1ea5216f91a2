"""Every variant of the 4-bit kernels compiles for the GPUs we serve on, without a GPU being there.

What the assembler reports is checked too: nothing spills, tensor cores do the half-precision products, codes
are read in 16-byte pieces, and a weight costs no more instructions than the design counts on.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_kernels import dispatch
from loraplex_kernels.quant import Plan, tiles

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter replaces the compiler")

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIVISIBLE_BY_16 = ("x_stride", "n", "k", "size")
# Shared memory a program may have, KiB.
SHARED = {80: 163, 89: 99, 90: 227}
PERMUTED = ("nf4", "nf4-double", "int4-128", "int4-32")


@dataclass(frozen=True)
class Compiled:
    """One compiled variant: PTX, machine code, and the assembler's count of resources."""

    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    def instructions(self, operation: str) -> int:
        """The number of such instructions in the whole kernel."""
        return len(
            re.findall(rf"^\s*/\*[0-9a-f]{{4,}}\*/\s+(?:@!?U?P\w+ )?{operation}", self.sass, re.MULTILINE)
        )


def compile_for(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], plan: Plan, folder: Path
) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes, constexprs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[index,] = constants[name]
            continue
        signature[name] = f"*{types[name]}" if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or name in DIVISIBLE_BY_16:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(what: str) -> str:
        return subprocess.run([cuobjdump, what, cubin], capture_output=True, text=True, check=True).stdout

    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", dump("-res-usage"))}
    return Compiled(
        ptx=compiled.asm["ptx"],
        sass=dump("-sass"),
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
    )


def pointer_types(format_: str, dtype: torch.dtype, result: str) -> dict[str, str]:
    scale = "fp32" if format_ == "nf4" else "i32"
    names = ("absmax_ptr", "nested_levels_ptr", "offset_ptr", "levels_ptr")
    return {
        "x_ptr": TYPES[dtype],
        "codes_ptr": "u8",
        "scale_ptr": scale,
        "zero_ptr": scale,
        "bias_ptr": TYPES[dtype],
        "y_ptr": result,
        "out_ptr": result,
        **dict.fromkeys(names, "fp32"),
    }


def weight_constants(format_: str) -> dict[str, Any]:
    return {
        "FORMAT": format_[:4].rstrip("-"),
        "GROUP": 64 if format_.startswith("nf4") else int(format_.removeprefix("int4-")),
        "NESTED": format_ == "nf4-double",
        "ZERO": False,
        "PARTIAL": format_ == "int4-32",
    }


def product(
    capability: int, format_: str, dtype: torch.dtype, plan: Plan, folder: Path, lookup: str | None = None
) -> Compiled:
    from loraplex_kernels.quant.kernel import split_kernel, tile_kernel

    if lookup is None:
        exact = dtype == torch.bfloat16 or (dtype == torch.float16 and format_.startswith("nf4"))
        lookup = plan.lookup if exact else "load"
    split = plan.family == "split"
    constants = {
        **weight_constants(format_),
        "HAS_BIAS": split,
        "ROWS": plan.rows,
        "COLUMNS": plan.columns,
        "STAGES": plan.stages,
        "LOOKUP": lookup,
        **({"WARPS": plan.warps} if split else {"UNROLL": plan.unroll}),
    }
    types = pointer_types(format_, dtype, TYPES[dtype] if split or plan.rows > 64 else "fp32")
    return compile_for(capability, split_kernel if split else tile_kernel, types, constants, plan, folder)


def check(compiled: Compiled, capability: int, dtype: torch.dtype, plan: Plan, read_bits: int = 128) -> None:
    assert compiled.stack_bytes == 0, f"spills: {compiled.stack_bytes} bytes of stack"
    assert "STL" not in compiled.sass, "spills to local memory"
    assert compiled.shared_bytes <= SHARED[capability] * 1024, "more shared memory than there is"
    assert re.search(rf"LDG(STS)?\.E(\.\w+)*\.({read_bits}|128)", compiled.sass), "reads in small pieces"
    if dtype != torch.float32:
        wgmma = capability == 90 and plan.family == "tile"
        assert ("wgmma.mma_async" if wgmma else "mma.sync") in compiled.ptx


def variants(dtype: torch.dtype, formats: tuple[str, ...], always: tuple[tuple[str, Plan], ...]) -> list[Any]:
    """Every format with every plan; those not in `always` are left to the wide sweep."""
    return [
        pytest.param(
            format_,
            plan,
            marks=() if (format_, plan) in always else pytest.mark.kernels_wide,
            id=f"{format_}-{plan.family}-{plan.rows}x{plan.columns}",
        )
        for format_ in formats
        for plan in tiles.variants(dtype)
    ]


ALWAYS = (
    *(("nf4", plan) for plan in tiles.variants(torch.bfloat16)),
    *(("int4-128", plan) for plan in (tiles.SPLIT_WIDE, tiles.TILES[0], tiles.TILES[-1])),
    ("nf4-double", tiles.TILES[0]),
)


@pytest.mark.parametrize(("format_", "plan"), variants(torch.bfloat16, PERMUTED, ALWAYS))
def test_bf16_on_hopper(format_: str, plan: Plan, tmp_path: Path) -> None:
    compiled = product(90, format_, torch.bfloat16, plan, tmp_path)
    check(compiled, 90, torch.bfloat16, plan)
    assert compiled.registers * 32 * plan.warps <= 65536
    # The table is read by byte permutes alone: no memory, no shuffle, twelve permutes for eight weights.
    assert compiled.instructions("SHFL") <= 8 * plan.rows, "more than the sum over warps"
    if plan.family == "tile" and plan.rows <= 64:
        waits = compiled.instructions("WARPGROUP.DEPBAR")
        assert waits < compiled.instructions("HGMMA"), "every product is waited for"
    if format_ == "nf4":
        decoded = plan.columns * 64 * (plan.unroll if plan.family == "tile" else plan.warps)
        weights = decoded // (32 * plan.warps)
        assert compiled.instructions("PRMT") <= 1.5 * weights + 24
    if format_.startswith("int4"):
        assert compiled.instructions("HFMA2") > 0, "scaled two at a time"


@pytest.mark.parametrize(
    ("format_", "plan"), variants(torch.float16, ("nf4", "int4-64"), (("nf4", tiles.TILES[0]),))
)
def test_fp16_on_hopper(format_: str, plan: Plan, tmp_path: Path) -> None:
    compiled = product(90, format_, torch.float16, plan, tmp_path)
    check(compiled, 90, torch.float16, plan, read_bits=128 if format_ == "nf4" else 64)


@pytest.mark.parametrize(
    ("format_", "plan"),
    variants(
        torch.float32,
        ("nf4", "nf4-double", "int4-32"),
        (("nf4", tiles.SINGLE_SPLIT), ("int4-32", tiles.SINGLE_TILE)),
    ),
)
def test_fp32_on_hopper(format_: str, plan: Plan, tmp_path: Path) -> None:
    compiled = product(90, format_, torch.float32, plan, tmp_path)
    check(compiled, 90, torch.float32, plan)
    assert "mma" not in compiled.ptx, "tf32 would round the activations"


@pytest.mark.kernels_wide
@pytest.mark.parametrize(("lookup", "plan"), [("gather", tiles.SPLIT_NARROW), ("load", tiles.TILES[0])])
def test_other_lookups_on_hopper(lookup: str, plan: Plan, tmp_path: Path) -> None:
    check(product(90, "nf4", torch.bfloat16, plan, tmp_path, lookup), 90, torch.bfloat16, plan)


@pytest.mark.parametrize(
    ("capability", "format_", "plan"),
    [(80, "nf4", tiles.TILES[0]), (89, "nf4", tiles.SPLIT_NARROW), (89, "int4-128", tiles.TILES[0])],
)
def test_ampere_and_ada(capability: int, format_: str, plan: Plan, tmp_path: Path) -> None:
    compiled = product(capability, format_, torch.bfloat16, plan, tmp_path)
    check(compiled, capability, torch.bfloat16, plan)


@pytest.mark.parametrize("format_", ["nf4-double", "int4-32"])
def test_dequantize_on_hopper(format_: str, tmp_path: Path) -> None:
    from loraplex_kernels.quant.kernel import dequantize_kernel

    constants = {**weight_constants(format_), "COLUMNS": 64}
    types = pointer_types(format_, torch.bfloat16, "bf16")
    compiled = compile_for(90, dequantize_kernel, types, constants, Plan("library"), tmp_path)
    assert compiled.stack_bytes == 0
    assert re.search(r"STG\.E(\.\w+)*\.128", compiled.sass), "no 16-byte writes"


def test_sum_of_planes_on_hopper(tmp_path: Path) -> None:
    from loraplex_kernels.quant.kernel import sum_planes_kernel

    constants = {"HAS_BIAS": True, "PLANES": tiles.MAX_PLANES, "COUNT": 1024}
    types = {"planes_ptr": "fp32", "bias_ptr": "bf16", "y_ptr": "bf16"}
    compiled = compile_for(90, sum_planes_kernel, types, constants, Plan("tile"), tmp_path)
    assert compiled.stack_bytes == 0
    assert re.search(r"LDG\.E(\.\w+)*\.128", compiled.sass), "no 16-byte reads"
    assert compiled.instructions("RED|ATOM") == 0
