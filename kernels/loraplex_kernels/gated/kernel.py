"""The Triton kernel of the gate: a program has a piece of one row of gate and of up."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


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
