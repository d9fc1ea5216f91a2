"""The launch of the gate's kernel."""

from __future__ import annotations

import triton
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.gated.kernel import gated_kernel
from loraplex_kernels.gated.reference import Activation
from loraplex_kernels.strides import contiguous_rows

BLOCK = 1024
"""Elements of a program at most: 16 bytes of half precision for each thread of four warps."""


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Launch the gate for gate and up ``[..., N]``."""
    width = gate.shape[-1]
    rows = [contiguous_rows(each.reshape(-1, width)) for each in (gate, up)]
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
