"""The Triton kernel of the gate, and its launch: a program has a piece of one row of gate and of up."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.gated.reference import Activation

# 16 bytes of half precision for each thread of four warps.
BLOCK = 1024


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Of float32 values."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2 u)).
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def gated_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < WIDTH
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0)
    rounded = _activated(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    product = rounded.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, product.to(gate.dtype), mask=mask)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Launch the gate for gate and up ``[..., N]``."""
    width = gate.shape[-1]
    rows = [_unit(each.reshape(-1, width)) for each in (gate, up)]
    out = gate.new_empty(gate.shape)
    columns = min(BLOCK, triton.next_power_of_2(width))
    gated_kernel[(rows[0].shape[0], triton.cdiv(width, columns))](
        *rows,
        out,
        rows[0].stride(0),
        rows[1].stride(0),
        WIDTH=width,
        ACTIVATION=activation,
        COLUMNS=columns,
        num_warps=4,
    )
    dispatch.count("gated", "triton")
    return out


def _unit(rows: Tensor) -> Tensor:
    """`rows` with contiguous values; any other stride will do."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
