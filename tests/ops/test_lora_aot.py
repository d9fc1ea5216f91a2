"""Every variant of the Triton LoRA kernels compiles for the GPUs we serve on, without a GPU being there.

What the assembler reports is checked too: nothing spills, tensor cores do the half-precision products, and
adapters are read in 16-byte pieces.
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
from loraplex_kernels.lora import tiles

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter replaces the compiler")

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROWS = (tiles.DECODE_ROWS, tiles.PREFILL_ROWS)
H_PITCH = 64
DIVISIBLE_BY_16 = re.compile(r"x_stride|y_stride|in_features|column_\d|width_\d")


@dataclass(frozen=True)
class Compiled:
    """What became of one variant: PTX, machine code, and the assembler's count of resources."""

    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def compile_for(
    capability: int,
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    tmp_path: Path,
) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    element = TYPES[dtype]
    pointers = {
        "x_ptr": element,
        "arena_ptr": element,
        "y_ptr": element,
        "h_ptr": "fp32",
        "pair_weight_ptr": "fp32",
        "a_offset_ptr": "i64",
        "b_offset_ptr": "i64",
    }
    signature, attributes, constexprs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[index,] = constants[name]
        else:
            signature[name] = f"*{pointers.get(name, 'i32')}" if name.endswith("_ptr") else "i32"
            if name.endswith("_ptr") or DIVISIBLE_BY_16.fullmatch(name):
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    resources = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout)
    usage = {name: int(value) for name, value in resources}
    return Compiled(
        ptx=compiled.asm["ptx"],
        sass=subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def shrink_variant(capability: int, dtype: torch.dtype, rows: int, tmp_path: Path) -> Compiled:
    from loraplex_kernels.lora.kernel import shrink_kernel

    config = tiles.choose(rows, dtype)
    constants = {
        "H_PITCH": H_PITCH,
        "ROWS": rows,
        "RANK_BLOCK": config.shrink_rank,
        "K_BLOCK": config.shrink_k,
        "UPCAST": False,
    }
    warps, stages = config.shrink_warps, config.shrink_stages
    return compile_for(capability, shrink_kernel, dtype, constants, warps, stages, tmp_path)


def expand_variant(capability: int, dtype: torch.dtype, rows: int, planes: int, tmp_path: Path) -> Compiled:
    from loraplex_kernels.lora.kernel import expand_kernel

    config = tiles.choose(rows, dtype)
    constants = {
        "H_PITCH": H_PITCH,
        "ROWS": rows,
        "RANK_BLOCK": config.expand_rank,
        "COLUMN_BLOCK": config.expand_columns,
        "PLANES": planes,
        "UPCAST": False,
    }
    warps, stages = config.expand_warps, config.expand_stages
    return compile_for(capability, expand_kernel, dtype, constants, warps, stages, tmp_path)


def check(compiled: Compiled, capability: int, dtype: torch.dtype, rows: int) -> None:
    assert compiled.stack_bytes == 0, f"spills: {compiled.stack_bytes} bytes of stack"
    assert compiled.local_bytes == 0
    assert "STL" not in compiled.sass, "spills to local memory"
    assert compiled.shared_bytes <= 99 * 1024, "more shared memory than sm_89 has"
    if dtype != torch.float32:
        hopper_prefill = capability == 90 and rows == tiles.PREFILL_ROWS
        assert ("wgmma.mma_async" if hopper_prefill else "mma.sync") in compiled.ptx
    assert re.search(r"LDG\.E(\.\w+)*\.128|LDGSTS(\.\w+)*\.128", compiled.sass), "no 16-byte reads"


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize("rows", ROWS)
def test_shrink_on_hopper(dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    check(shrink_variant(90, dtype, rows, tmp_path), 90, dtype, rows)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize(
    ("rows", "planes"), [*((tiles.DECODE_ROWS, planes) for planes in tiles.PLANES), (tiles.PREFILL_ROWS, 1)]
)
def test_expand_on_hopper(dtype: torch.dtype, rows: int, planes: int, tmp_path: Path) -> None:
    compiled = expand_variant(90, dtype, rows, planes, tmp_path)
    check(compiled, 90, dtype, rows)
    if rows == tiles.DECODE_ROWS and dtype != torch.float32:
        assert compiled.registers <= 128, "fewer than four programs fit a multiprocessor"


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("rows", ROWS)
def test_ampere_and_ada(capability: int, rows: int, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    check(shrink_variant(capability, dtype, rows, tmp_path), capability, dtype, rows)
    planes = 4 if rows == tiles.DECODE_ROWS else 1
    check(expand_variant(capability, dtype, rows, planes, tmp_path), capability, dtype, rows)
