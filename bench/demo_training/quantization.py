"""Demo weights as the 4-bit formats would serve them: quantised, then dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from loraplex_kernels.quant import int4, nf4

Mode = Literal["none", "nf4", "int4"]
MODES: tuple[Mode, ...] = ("none", "nf4", "int4")


def dequantized(weight: torch.Tensor, mode: Mode) -> torch.Tensor:
    """`weight` [out, in] after a round trip through `mode`, float32; `none` returns it as it is."""
    if mode == "none":
        return weight
    return nf4.dequantize(nf4.quantize(weight)) if mode == "nf4" else int4.dequantize(int4.quantize(weight))


def decoder_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers a 4-bit server quantises: those of the decoder layers, neither embedding nor head."""
    decoder = model.get_submodule("model.layers")
    return [module for module in decoder.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def quantize_(model: nn.Module, mode: Mode) -> None:
    """Replaces the decoder's weights by their round trip through `mode`, before adapters are attached."""
    for linear in decoder_linears(model):
        linear.weight.copy_(dequantized(linear.weight, mode))


@contextmanager
def quantization_noise(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Runs the body on weights after a round trip through `mode`; gradients belong to the exact weights.

    This is the straight-through estimator: the rounding counts as the identity in the backward pass.
    """
    linears = decoder_linears(model) if mode != "none" else []
    exact = [linear.weight.data for linear in linears]
    for linear in linears:
        linear.weight.data = dequantized(linear.weight.data, mode)
    try:
        yield
    finally:
        for linear, weight in zip(linears, exact, strict=True):
            linear.weight.data = weight
