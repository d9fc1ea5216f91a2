"""Every variant of the Triton LoRA kernels compiles for the GPUs we serve on, without a GPU being there.

What the assembler reports is checked too: nothing spills, tensor cores do the products of many rows, and
adapters are read in 16-byte pieces, of which a row-by-row product has many on the way at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_kernels import dispatch
from loraplex_kernels.lora import tiles
from loraplex_kernels.pool import PREFILL_ROWS

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(dispatch.interpreting(), reason="the interpreter replaces the compiler")

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}
HALVES = (torch.bfloat16, torch.float16)
H_PITCH = 64
DIVISIBLE_BY_16 = re.compile(r"x_stride|y_stride|in_features|column_\d|width_\d")


@dataclass(frozen=True)
class Variant:
    """One row of the table with one compute dtype."""

    family: tiles.Family
    compute: torch.dtype
    adapters: torch.dtype
    config: tiles.LoraTiles

    def __str__(self) -> str:
        return f"{self.family}-{TYPES[self.compute]}-{TYPES[self.adapters]}"


def variants() -> Iterator[Variant]:
    """Every row of the table with every dtype, less those that compile to the same code as one before."""
    seen = set()
    for family in tiles.FAMILIES:
        for compute in (torch.float32, *HALVES):
            for adapters in (compute, torch.int8):
                config = tiles.BUILT_IN[family, tiles.element(adapters, compute)]
                code = (compute, adapters, dataclasses.replace(config, shrink_programs=0))
                if code not in seen:
                    seen.add(code)
                    yield Variant(family, compute, adapters, config)


VARIANTS = tuple(variants())
ALL_VARIANTS = [
    # float16 makes nearly the same code as bfloat16, and float32 beside int8 is no one's choice on a GPU.
    pytest.param(variant, marks=pytest.mark.kernels_wide)
    if variant.compute == torch.float16
    or (variant.compute == torch.float32 and variant.adapters == torch.int8)
    else variant
    for variant in VARIANTS
]
BF16 = tuple(v for v in VARIANTS if v.compute == torch.bfloat16)
PLAIN_BF16 = tuple(v for v in BF16 if v.adapters == torch.bfloat16)


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
    variant: Variant,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    path: Path,
) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "x_ptr": TYPES[variant.compute],
        "y_ptr": TYPES[variant.compute],
        "arena_ptr": TYPES[variant.adapters],
        "h_ptr": "fp32",
        "scale_ptr": "fp32",
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
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": constants["PDL"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    cubin = path / "kernel.cubin"
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


def compile_shrink(capability: int, variant: Variant, slices: int, path: Path, even: bool = True) -> Compiled:
    from loraplex_kernels.lora import kernel, launch

    config = variant.config
    constants = {
        **launch.shrink_constants(config, slices, even, variant.adapters),
        "H_PITCH": H_PITCH,
        "UPCAST": False,
        "PDL": config.pdl,
    }
    chosen = kernel.shrink_stacked_kernel if config.stacked else kernel.shrink_decode_kernel
    return compile_for(
        capability, chosen, variant, constants, config.shrink_warps, config.shrink_stages, path
    )


def compile_expand(capability: int, variant: Variant, planes: int, path: Path) -> Compiled:
    from loraplex_kernels.lora import kernel, launch

    config = variant.config
    constants = {
        **launch.expand_constants(config, planes, variant.adapters),
        "H_PITCH": H_PITCH,
        "UPCAST": False,
        "PDL": config.pdl,
    }
    return compile_for(
        capability, kernel.expand_kernel, variant, constants, config.expand_warps, config.expand_stages, path
    )


def check(compiled: Compiled, capability: int, variant: Variant) -> None:
    assert compiled.stack_bytes == 0, f"spills: {compiled.stack_bytes} bytes of stack"
    assert compiled.local_bytes == 0
    assert "STL" not in compiled.sass, "spills to local memory"
    assert compiled.shared_bytes <= 99 * 1024, "more shared memory than sm_89 has"
    if variant.compute != torch.float32:
        wgmma = capability == 90 and variant.config.rows == PREFILL_ROWS
        assert ("wgmma.mma_async" if wgmma else "mma.sync") in compiled.ptx
    assert re.search(r"LDG\.E(\.\w+)*\.128|LDGSTS(\.\w+)*\.128", compiled.sass), "no 16-byte reads"


def in_flight(compiled: Compiled, warps: int) -> int:
    """Bytes that the row-by-row product of one multiprocessor's programs can have on the way at once."""
    streaming = len(re.findall(r"LDG\.E\.EF\.128", compiled.sass))
    programs = min(65536 // (compiled.registers * warps * 32), 228 * 1024 // (compiled.shared_bytes + 1024))
    return programs * warps * 32 * 16 * streaming


# Latency of device memory times its rate, per multiprocessor of an H100, is about 18 KiB.
ENOUGH_IN_FLIGHT = 40 * 1024


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_shrink_on_hopper(variant: Variant, tmp_path: Path) -> None:
    for slices in (1, 3) if variant.config.stacked else (1,):
        compiled = compile_shrink(90, variant, slices, tmp_path)
        check(compiled, 90, variant)
        if variant.family == "decode" and variant.compute != torch.float32:
            assert in_flight(compiled, variant.config.shrink_warps) >= ENOUGH_IN_FLIGHT


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_expand_on_hopper(variant: Variant, tmp_path: Path) -> None:
    compiled = compile_expand(90, variant, 8 if variant.family == "decode" else 2, tmp_path)
    check(compiled, 90, variant)
    if variant.family == "decode" and variant.compute != torch.float32:
        assert in_flight(compiled, variant.config.expand_warps) >= ENOUGH_IN_FLIGHT


@pytest.mark.parametrize("planes", tiles.PLANES)
@pytest.mark.parametrize("variant", PLAIN_BF16, ids=str)
def test_every_number_of_planes(variant: Variant, planes: int, tmp_path: Path) -> None:
    check(compile_expand(90, variant, planes, tmp_path), 90, variant)


@pytest.mark.parametrize("variant", PLAIN_BF16, ids=str)
def test_odd_inner_dimension(variant: Variant, tmp_path: Path) -> None:
    check(compile_shrink(90, variant, 2, tmp_path, even=False), 90, variant)


@pytest.mark.parametrize("variant", BF16, ids=str)
def test_programmatic_dependent_launch(variant: Variant, tmp_path: Path) -> None:
    dependent = dataclasses.replace(variant, config=dataclasses.replace(variant.config, pdl=True))
    for compiled in (compile_shrink(90, dependent, 2, tmp_path), compile_expand(90, dependent, 2, tmp_path)):
        check(compiled, 90, variant)
        assert "griddepcontrol.launch_dependents" in compiled.ptx
        assert compiled.ptx.count("griddepcontrol.wait") >= 2, "neutral programs must wait as well"


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("variant", PLAIN_BF16, ids=str)
def test_ampere_and_ada(capability: int, variant: Variant, tmp_path: Path) -> None:
    check(compile_shrink(capability, variant, 2, tmp_path), capability, variant)
    planes = 4 if variant.family == "decode" else 1
    check(compile_expand(capability, variant, planes, tmp_path), capability, variant)


def tuning_candidates() -> Iterator[Variant]:
    """The candidates that `make tune-gpu` tries from the built-in table, bf16."""
    from loraplex_bench import tune_lora

    for family, groups in tune_lora.GROUPS.items():
        for adapters in (torch.bfloat16, torch.int8):
            config = tiles.BUILT_IN[family, tiles.element(adapters, torch.bfloat16)]
            for group in groups:
                for changed in tune_lora.candidates(config, group):
                    if dataclasses.replace(changed, shrink_programs=config.shrink_programs) != config:
                        yield Variant(family, torch.bfloat16, adapters, changed)


@pytest.mark.kernels_wide
@pytest.mark.parametrize("family", tiles.FAMILIES)
def test_candidates_compile(family: tiles.Family, tmp_path: Path) -> None:
    for variant in tuning_candidates():
        if variant.family == family:
            for compiled in (
                compile_shrink(90, variant, 2, tmp_path),
                compile_expand(90, variant, 4, tmp_path),
            ):
                assert compiled.shared_bytes <= 227 * 1024, f"{variant.config} does not fit an H100"
