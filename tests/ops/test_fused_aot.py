"""The fused elementwise kernels compile for the GPUs we serve on, without a GPU being there.

They move bytes and do little else. So what is checked in the machine code is that nothing spills, that reads
and writes of rows are of 16 bytes a thread, and that enough programs fit a multiprocessor to hide latencies.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraplex_kernels import dispatch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")
WIDE = pytest.mark.kernels_wide
pytestmark = pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter replaces the compiler")


@dataclass(frozen=True)
class Compiled:
    """Machine code of one variant, and the assembler's count of resources."""

    sass: str
    registers: int
    stack_bytes: int
    local_bytes: int
    warps: int

    def widths(self, instruction: str) -> set[str]:
        """Bits of each LDG or STG that this code has, by thread; "" for 32."""
        found = re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", self.sass)
        return {(re.findall(r"\.(U?\d+)(?:\.|$)", flags) or [""])[0] for flags in found}

    def check(self, threads: int = 1024) -> None:
        assert (self.stack_bytes, self.local_bytes) == (0, 0), "spills"
        assert self.registers * 32 * self.warps * max(1, threads // (32 * self.warps)) <= 65536, "few fit"


def compile_for(
    capability: int,
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    folder: Path,
    pointers: dict[str, str] | None = None,
) -> Compiled:
    """Pointers are to bf16 unless `pointers` says otherwise; they and strides are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes, constexprs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[index,] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{(pointers or {}).get(name, 'bf16')}"
        else:
            signature[name] = "fp32" if name.endswith("eps") else "i32"
        if name.endswith(("_ptr", "_stride")):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 1}
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout)}
    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return Compiled(sass, usage["REG"], usage["STACK"], usage["LOCAL"], warps)


@pytest.mark.parametrize(
    ("capability", "width", "form", "after"),
    [
        pytest.param(90, 4096, "rounded", None, id="hopper-llama-3-8b"),
        pytest.param(90, 3584, "offset", "offset", id="hopper-gemma-2-9b"),
        pytest.param(90, 8192, "rounded", None, marks=WIDE, id="hopper-llama-3-70b"),
        pytest.param(90, 16384, "single", "single", marks=WIDE, id="hopper-widest"),
        pytest.param(80, 3072, "rounded", None, marks=WIDE, id="ampere-phi-3"),
        pytest.param(89, 896, "rounded", None, marks=WIDE, id="ada-qwen2-half-b"),
    ],
)
def test_sum_and_norm(capability: int, width: int, form: str, after: str | None, tmp_path: Path) -> None:
    from loraplex_kernels.norm.kernel import add_rms_norm_kernel
    from loraplex_kernels.norm.launch import tile

    rows, block, warps = tile(width)
    constants = {"WIDTH": width, "AFTER": after, "FORM": form, "ROWS": rows, "BLOCK": block}
    compiled = compile_for(capability, add_rms_norm_kernel, constants, warps, tmp_path)
    compiled.check(1024 if warps < 16 else 512)
    assert compiled.widths("LDG") == compiled.widths("STG") == {"128"}


@pytest.mark.parametrize(
    ("capability", "width"),
    [(90, 128), pytest.param(90, 4096, marks=WIDE), pytest.param(80, 256, marks=WIDE)],
)
def test_norm(capability: int, width: int, tmp_path: Path) -> None:
    """Of hidden states, and of single heads."""
    from loraplex_kernels.norm.kernel import rms_norm_kernel
    from loraplex_kernels.norm.launch import tile

    rows, block, warps = tile(width)
    constants = {"WIDTH": width, "FORM": "rounded", "ROWS": rows, "BLOCK": block}
    compiled = compile_for(capability, rms_norm_kernel, constants, warps, tmp_path)
    compiled.check()
    # The weight of a head has fewer values than a program has threads.
    assert compiled.widths("LDG") - ({"128"} if width > 1024 else {"128", "U16", ""}) == set()
    assert compiled.widths("STG") == {"128"}


@pytest.mark.parametrize(
    ("capability", "width", "activation"),
    [
        (90, 14336, "silu"),
        pytest.param(80, 14336, "gelu_tanh", marks=WIDE),
        pytest.param(89, 8192, "gelu", marks=WIDE),
        pytest.param(80, 18944, "silu", marks=WIDE),
    ],
)
def test_gate(capability: int, width: int, activation: str, tmp_path: Path) -> None:
    from loraplex_kernels.gated.kernel import gated_kernel
    from loraplex_kernels.gated.launch import BLOCK

    constants = {"WIDTH": width, "ACTIVATION": activation, "COLUMNS": BLOCK}
    compiled = compile_for(capability, gated_kernel, constants, 4, tmp_path)
    compiled.check()
    assert compiled.widths("LDG") == compiled.widths("STG") == {"128"}


@pytest.mark.parametrize(
    ("capability", "heads", "head_dim", "rotary", "cache"),
    [
        pytest.param(90, (32, 8), 128, 128, "bf16", id="hopper-llama-3-8b"),
        pytest.param(90, (32, 8), 128, 128, "fp8e4nv", marks=WIDE, id="hopper-8-bit-cache"),
        pytest.param(90, (16, 8), 256, 256, "bf16", marks=WIDE, id="hopper-gemma-2-9b"),
        pytest.param(90, (24, 8), 128, 96, "bf16", marks=WIDE, id="hopper-partial"),
        pytest.param(80, (32, 32), 96, 96, "bf16", marks=WIDE, id="ampere-phi-3"),
        pytest.param(89, (14, 2), 64, 64, "bf16", marks=WIDE, id="ada-qwen2-half-b"),
    ],
)
def test_rotation_and_write(
    capability: int, heads: tuple[int, int], head_dim: int, rotary: int, cache: str, tmp_path: Path
) -> None:
    from loraplex_kernels.attention.rotary.kernel import rotate_write_kernel
    from loraplex_kernels.attention.rotary.launch import constants

    narrow = cache != "bf16"
    chosen = {
        **constants(*heads, head_dim, rotary),
        "BLOCK_SIZE": 16,
        "LARGEST": 448.0 if narrow else None,
    }
    pointers = {"cache_ptr": cache, "slot_ptr": "i64"}
    compiled = compile_for(capability, rotate_write_kernel, chosen, 4, tmp_path, pointers)
    compiled.check()
    # 8 bytes are the cell's number, what lies past a partial rotation, or 8-bit floats.
    assert "128" in compiled.widths("LDG")
    assert "128" in compiled.widths("STG")
    assert compiled.widths("LDG") | compiled.widths("STG") == {"128", "64"}
