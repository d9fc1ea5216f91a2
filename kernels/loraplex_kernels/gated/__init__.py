"""The gate of a feed-forward network: ``activation(gate) · up``, row by row.

gate and up are two column ranges of one packed projection, or separate tensors. The activation is computed in
float32 and rounded to their dtype; so is the product, as in two modules.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.gated import reference
from loraplex_kernels.gated.reference import ACTIVATIONS, Activation

__all__ = ["ACTIVATIONS", "Activation", "gated"]


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up`` for gate and up ``[..., N]``, contiguous, in their dtype.

    Raises `ValueError` for an unknown activation, or where shapes or dtypes differ.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} in {gate.dtype} and up {tuple(up.shape)} in {up.dtype} "
            "must be of one shape and dtype"
        )
    if gate.numel() and gate.dtype in dispatch.FLOATS and dispatch.backend(gate.device) == "triton":
        from loraplex_kernels.gated import launch

        return launch.gated(gate, up, activation)
    dispatch.count("gated", "torch")
    return reference.gated(gate, up, activation)
