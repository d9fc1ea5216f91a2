"""The launch of the 4-bit kernels: what a plan means in grids and compile-time arguments."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.quant import lookup, tiles
from loraplex_kernels.quant.blocked import BLOCK, BlockedWeight
from loraplex_kernels.quant.kernel import dequantize_kernel, split_kernel, sum_planes_kernel, tile_kernel
from loraplex_kernels.quant.tiles import Plan

# The interpreter runs no PTX.
_INTERPRETED = dispatch.interpreting()

_SUM_BLOCK = 1024
"""Elements of a program of `sum_planes_kernel`: 16 bytes of half precision for each of 128 threads."""

_DEQUANTIZE_COLUMNS = 64
"""Output columns of a program of `dequantize_kernel`: with a block's 64 inputs, 32 elements a thread."""

_DEFAULT_MULTIPROCESSORS = 132
"""Number of multiprocessors that plans assume without a device: an H100's."""


def matmul(rows: Tensor, w: BlockedWeight, bias: Tensor | None, plan: Plan | None = None) -> Tensor:
    """``rows @ dequantize(w).T + bias``, [M, N], for M of at least 1 and contiguous rows."""
    m, (n, k) = rows.shape[0], w.shape
    if plan is None:
        plan = tiles.choose(m, n, w.blocks, rows.dtype, _multiprocessors(w.device))
    if plan.family == "library":
        return _matmul_by_library(rows, w, bias)
    name = plan.lookup if plan.lookup != "permute" or _permutes(rows.dtype, w) else "load"
    planes = min(plan.planes, w.blocks) if plan.family == "tile" else 1
    span = -(-w.blocks // planes)
    planes = -(-w.blocks // span)
    words: tuple[int, ...] = (0,) * 8
    if name == "permute":
        words = lookup.planes(rows.dtype) if w.format == "nf4" else (lookup.ONES,) * 8
    y = _empty((m, n), rows.dtype, rows.device)
    out = y if planes == 1 else _empty((planes, m, n), torch.float32, rows.device)
    added = bias if planes == 1 else None
    grid = [-(-n // plan.columns), -(-m // plan.rows)]
    constants = {"ROWS": plan.rows, "COLUMNS": plan.columns, "STAGES": plan.stages, "LOOKUP": name}
    if plan.family == "split":
        kernel = split_kernel
        constants["WARPS"] = plan.warps
    else:
        kernel = tile_kernel
        grid.append(planes)
        divides = span % plan.unroll == 0 and w.blocks % plan.unroll == 0
        constants["UNROLL"] = plan.unroll if divides else 1
    dispatch.count(f"{w.format}.matmul", "triton")
    kernel[tuple(grid)](
        rows,
        *_weight_pointers(w),
        rows if added is None else added,
        out,
        *words,
        rows.stride(0),
        m,
        n,
        k,
        w.blocks,
        **_weight_constants(w),
        HAS_BIAS=added is not None,
        **constants,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if planes > 1:
        _sum_planes(out, bias, y)
    return y


def _permutes(dtype: torch.dtype, w: BlockedWeight) -> bool:
    """True if the byte permutes (int4: the bit patterns) can decode this weight to `dtype`."""
    if _INTERPRETED or dtype == torch.float32:
        return False
    return w.format == "nf4" or (dtype == torch.bfloat16 and w.zero is None)


def _sum_planes(planes: Tensor, bias: Tensor | None, y: Tensor) -> None:
    dispatch.count("quant.sum_planes", "triton")
    sum_planes_kernel[(-(-y.numel() // _SUM_BLOCK),)](
        planes,
        planes if bias is None else bias,
        y,
        y.numel(),
        y.shape[1],
        HAS_BIAS=bias is not None,
        PLANES=planes.shape[0],
        COUNT=_SUM_BLOCK,
        num_warps=4,
    )


def _matmul_by_library(rows: Tensor, w: BlockedWeight, bias: Tensor | None) -> Tensor:
    n, k = w.shape
    y = _empty((rows.shape[0], n), rows.dtype, rows.device)
    step = min(n, max(1, tiles.LIBRARY_TILE // k))
    if bias is not None:
        bias = bias.to(rows.dtype)
    for first in range(0, n, step):
        last = min(first + step, n)
        part = dequantize(w, rows.dtype, first, last)
        if bias is None:
            torch.mm(rows, part.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], rows, part.t(), out=y[:, first:last])
    return y


def dequantize(w: BlockedWeight, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Output rows ``first:last`` of the dense weight, [last - first, K] in `dtype`."""
    n, k = w.shape
    last = n if last is None else last
    out = _empty((last - first, k), dtype, w.device)
    dispatch.count(f"{w.format}.dequantize", "triton")
    dequantize_kernel[(-(-(last - first) // _DEQUANTIZE_COLUMNS), w.blocks)](
        *_weight_pointers(w),
        out,
        first,
        last,
        n,
        k,
        w.blocks,
        **_weight_constants(w),
        COLUMNS=_DEQUANTIZE_COLUMNS,
        num_warps=4,
    )
    return out


def _weight_pointers(w: BlockedWeight) -> tuple[Tensor, ...]:
    """Codes, scale, zero, the nested scale's three, and the levels; any tensor where there is none."""
    zero = w.scale if w.zero is None else w.zero
    nested = (w.scale,) * 3
    if w.nested is not None:
        nested = (w.nested.absmax, w.nested.levels, w.nested.offset)
    return (w.codes, w.scale, zero, *nested, lookup.levels(w.device))


def _weight_constants(w: BlockedWeight) -> dict[str, object]:
    return {
        "FORMAT": w.format,
        "GROUP": w.group,
        "NESTED": w.nested is not None,
        "ZERO": w.zero is not None,
        "PARTIAL": w.shape[1] % BLOCK != 0,
    }


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
