"""The Triton attention kernels compile for the GPUs we serve on, without a GPU being there.

What the assembler reports is checked too: nothing spills, tensor cores do the half-precision products, keys
are fetched ahead in 16-byte pieces, and the decode variants leave room for several programs a multiprocessor.
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
from loraplex_kernels.attention import tiles

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter replaces the compiler")

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
}
SINGLE, HALF, NARROW = torch.float32, torch.bfloat16, torch.float8_e4m3fn
DECODE, PREFILL = 0, 1


@dataclass(frozen=True)
class Compiled:
    """One compiled variant: PTX, machine code, and the assembler's count of resources."""

    ptx: str
    sass: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def compile_for(
    capability: int,
    kernel: Any,
    elements: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    folder: Path,
) -> Compiled:
    """`elements`: the pointers' element types (int32 if absent). Strides and pointers are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes, constexprs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[index,] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{elements.get(name, 'i32')}"
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
        if name.endswith(("_ptr", "_stride")):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout)}
    return Compiled(
        ptx=compiled.asm["ptx"],
        sass=subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def check_resources(compiled: Compiled, shared_limit: int) -> None:
    assert compiled.stack_bytes == 0, f"spills: {compiled.stack_bytes} bytes of stack"
    assert compiled.local_bytes == 0
    assert "STL" not in compiled.sass, "spills to local memory"
    assert compiled.shared_bytes <= shared_limit


def check_attend(
    capability: int,
    head_dim: int,
    which: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    *,
    window: bool,
    softcap: bool,
    folder: Path,
) -> None:
    from loraplex_kernels.attention.kernel import attend_kernel

    roomy = capability == 90
    variant = tiles.variants(head_dim, dtype, roomy=roomy)[which]
    elements = {
        "q_ptr": TYPES[dtype],
        "cache_ptr": TYPES[cache_dtype],
        "out_ptr": TYPES[dtype],
        "plane_ptr": "fp32",
        "weight_ptr": "fp32",
    }
    constants = {
        "GROUP": 4,
        "KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": 16,
        "ROWS": variant.rows,
        "KEYS": variant.keys,
        "COLUMNS": tiles.column_block(head_dim),
        "WINDOW": window,
        "SOFTCAP": softcap,
        "PHASES": variant.phases,
        "UPCAST": False,
    }
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = compile_for(capability, attend_kernel, elements, constants, options, folder)
    check_resources(compiled, (227 if roomy and which == PREFILL else 99) * 1024)
    if dtype != SINGLE:
        product = "wgmma.mma_async" if roomy and which == PREFILL else "mma.sync"
        assert product in compiled.ptx
        if which == DECODE:
            programs = 65536 // (compiled.registers * 32 * variant.warps)
            # 8-bit floats take registers to convert, but half the bytes are to be kept in flight.
            least = 2 if cache_dtype == NARROW else 3
            assert min(programs, 227 * 1024 // compiled.shared_bytes) >= least, "few programs fit"
    copies = re.findall(r"LDGSTS(?:\.\w+)*", compiled.sass)
    assert copies, "keys are not fetched ahead"
    if cache_dtype != NARROW:
        # The compiler fetches 8-bit values (not keys) of a small tile by 4 bytes a thread: whole rows still.
        assert all(".128" in copy for copy in copies), "keys are fetched in small pieces"


FEATURES = {"window": True, "softcap": True}
PLAIN = {"window": False, "softcap": False}


@pytest.mark.parametrize(
    ("capability", "head_dim", "which", "dtype", "cache_dtype", "features"),
    [
        pytest.param(90, 64, DECODE, HALF, HALF, FEATURES, id="hopper-64-decode"),
        pytest.param(90, 128, DECODE, HALF, HALF, FEATURES, id="hopper-128-decode"),
        pytest.param(90, 256, DECODE, HALF, HALF, FEATURES, id="hopper-256-decode"),
        pytest.param(90, 64, PREFILL, HALF, HALF, PLAIN, id="hopper-64-prefill"),
        pytest.param(90, 128, PREFILL, torch.float16, torch.float16, FEATURES, id="hopper-128-prefill"),
        pytest.param(90, 256, PREFILL, HALF, HALF, PLAIN, id="hopper-256-prefill"),
        pytest.param(90, 128, DECODE, SINGLE, SINGLE, FEATURES, id="hopper-128-single"),
        pytest.param(90, 128, DECODE, HALF, NARROW, PLAIN, id="hopper-128-decode-8-bit"),
        pytest.param(80, 80, PREFILL, HALF, HALF, PLAIN, id="ampere-80-prefill"),
        pytest.param(89, 128, DECODE, HALF, HALF, PLAIN, id="ada-128-decode"),
    ],
)
def test_attend(
    capability: int,
    head_dim: int,
    which: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    features: dict[str, bool],
    tmp_path: Path,
) -> None:
    check_attend(capability, head_dim, which, dtype, cache_dtype, **features, folder=tmp_path)


@pytest.mark.kernels_wide
@pytest.mark.parametrize("features", [PLAIN, FEATURES], ids=["plain", "window-softcap"])
@pytest.mark.parametrize("cache_dtype", TYPES, ids=TYPES.get)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_attend_wide(
    capability: int, head_dim: int, cache_dtype: torch.dtype, features: dict[str, bool], tmp_path: Path
) -> None:
    if cache_dtype == NARROW and capability < 89:
        pytest.skip("this GPU has no 8-bit floats")
    dtype = HALF if cache_dtype == NARROW else cache_dtype
    for which in range(len(tiles.variants(head_dim, dtype, roomy=capability == 90))):
        check_attend(capability, head_dim, which, dtype, cache_dtype, **features, folder=tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("head_dim", "rows"), [(80, 128), (128, 16)])
def test_merge(capability: int, head_dim: int, rows: int, tmp_path: Path) -> None:
    from loraplex_kernels.attention.kernel import merge_kernel
    from loraplex_kernels.attention.launch import MERGE_ROWS

    elements = {"plane_ptr": "fp32", "weight_ptr": "fp32", "out_ptr": "bf16"}
    constants = {
        "GROUP": 4,
        "KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "TILE_ROWS": rows,
        "ROWS": MERGE_ROWS,
        "COLUMNS": tiles.column_block(head_dim),
    }
    options = {"num_warps": 4, "num_stages": 3}
    compiled = compile_for(capability, merge_kernel, elements, constants, options, tmp_path)
    check_resources(compiled, 99 * 1024)
    assert re.search(r"(LDG\.E|LDGSTS)(\.\w+)*\.128", compiled.sass), "no 16-byte reads"


@pytest.mark.parametrize("cache_dtype", [HALF, NARROW], ids=TYPES.get)
@pytest.mark.parametrize(("head_dim", "heads"), [(80, 8), (128, 16)])
def test_write(head_dim: int, heads: int, cache_dtype: torch.dtype, tmp_path: Path) -> None:
    from loraplex_kernels.attention.kernel import write_kernel

    elements = {"k_ptr": "bf16", "v_ptr": "bf16", "cache_ptr": TYPES[cache_dtype], "slot_ptr": "i64"}
    constants = {
        "KV_HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": 16,
        "HEADS": heads,
        "COLUMNS": tiles.column_block(head_dim),
        "LARGEST": 448.0 if cache_dtype == NARROW else None,
    }
    compiled = compile_for(90, write_kernel, elements, constants, {"num_warps": 4, "num_stages": 1}, tmp_path)
    check_resources(compiled, 99 * 1024)
    assert re.search(r"LDG\.E(\.\w+)*\.128", compiled.sass), "no 16-byte reads"
    assert re.search(r"STG\.E(\.\w+)*\.(128|64)", compiled.sass), "no wide writes"
