"""Every op of the bench by name."""

from __future__ import annotations

from loraplex_bench.ops import attention, fused, lora, quant
from loraplex_bench.ops.registry import Op

OPS: dict[str, Op] = {op.name: op for op in (*lora.OPS, *quant.OPS, attention.OP, fused.OP)}
