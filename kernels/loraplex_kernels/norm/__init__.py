"""RMS norm of rows, alone or after the addition to the residual stream that comes before it.

For rows x [N] of a hidden state, in float32::

    y = x / sqrt(mean(x²) + eps)

and one of three ways to apply the weight, which differ in where they round (`Form`)::

    rounded   weight · round(y)         Llama, Mistral, Qwen, Phi-3
    single    round(weight · y)         OLMo-2
    offset    round((1 + weight) · y)   Gemma

`round` is to the dtype of x, which the weight has too. `add_rms_norm` rounds the sum before it norms it, as
two modules would. So in half precision results are those of transformers' modules but for the order of the
sum of squares.
"""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.norm import reference
from loraplex_kernels.norm.reference import FORMS, Form, RmsNorm

__all__ = ["FORMS", "Form", "RmsNorm", "add_rms_norm", "rms_norm"]

MAX_WIDTH = 16384
"""Widest row of the kernel, which holds it in registers; wider ones take the reference."""


def rms_norm(x: Tensor, norm: RmsNorm) -> Tensor:
    """The norm of x ``[..., N]``, contiguous, in x's dtype. Raises `ValueError` where it does not fit."""
    _check(x, norm)
    if x.numel() and _backend(x) == "triton":
        from loraplex_kernels.norm import launch

        return launch.rms_norm(x, norm)
    dispatch.count("norm.rms", "torch")
    return reference.rms_norm(x, norm)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: RmsNorm, *, after: RmsNorm | None = None
) -> tuple[Tensor, Tensor]:
    """``residual + x``, and the norm of it; with `after`, x is normed by that one first.

    x and residual are ``[..., N]``, of one dtype; both results are new and contiguous. Raises `ValueError`
    where shapes, dtypes or norms do not fit.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} in {x.dtype} and residual {tuple(residual.shape)} in {residual.dtype} "
            "must be of one shape and dtype"
        )
    for each in (norm,) if after is None else (after, norm):
        _check(x, each)
    if x.numel() and _backend(x) == "triton":
        from loraplex_kernels.norm import launch

        return launch.add_rms_norm(x, residual, norm, after)
    dispatch.count("norm.add_rms", "torch")
    return reference.add_rms_norm(x, residual, norm, after=after)


def _backend(x: Tensor) -> dispatch.Backend:
    """The implementation for these rows; torch for what the kernel cannot do, which is as right."""
    if x.dtype not in dispatch.FLOATS or x.shape[-1] > MAX_WIDTH:
        return "torch"
    return dispatch.backend(x.device)


def _check(x: Tensor, norm: RmsNorm) -> None:
    weight = norm.weight
    if x.ndim < 1 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"the norm's weight is {tuple(weight.shape)} in {weight.dtype}; "
            f"for rows {tuple(x.shape)} in {x.dtype} it must be as long as a row, and in {x.dtype}"
        )
    if norm.form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {norm.form!r}")
