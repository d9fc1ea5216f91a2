"""Fused kernels for the operations between the projections of a transformers model.

RMS norms, the additions to the residual stream before them, rotations of queries and keys with the write of
the KV cache, and the gates of feed-forward networks are one launch each. A step whose adapters
act there, on norms or on the residual stream, runs the model's own code instead (`StepContext.unfused`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loraplex_kernels.gated import gated
from loraplex_kernels.norm import RmsNorm, add_rms_norm, rms_norm
from loraplex_server.model.layers import context, recognise
from loraplex_server.model.layers.context import Rotation
from loraplex_server.model.layers.recognise import Block


@dataclasses.dataclass(frozen=True)
class Fused:
    """Numbers of modules with a fused kernel: norms, rotation and write, gates, and sums before norms."""

    norms: int
    attentions: int
    mlps: int
    layers: int

    def __str__(self) -> str:
        found = dataclasses.asdict(self)
        return ", ".join(f"{count} {name}" for name, count in found.items())


class _Carried:
    """Holds a norm's output, computed together with the sum before the norm, until the norm is called."""

    def __init__(self) -> None:
        self._norm: nn.Module | None = None
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None

    def put(self, norm: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        """Keeps y, the norm of x; only the newest is kept."""
        self._norm, self._x, self._y = norm, x, y

    def take(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Removes and returns the norm of x; None if it is not held."""
        found = self._y if self._norm is norm and self._x is x else None
        self._norm = self._x = self._y = None
        return found


def fuse(model: PreTrainedModel) -> Fused:
    """Replaces forward passes of recognised modules; parameters and module paths stay as they are.

    Call it after everything else that wraps a norm, and once the weights have their final place.
    """
    carried = _Carried()
    modules = list(model.modules())
    norms = {module: norm for module in modules if (norm := recognise.norm(module)) is not None}
    blocks = 0
    for path, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList):
            last = getattr(model.get_submodule(path.rpartition(".")[0]), "norm", None)
            blocks += _fuse_layers(list(layers), last, norms, carried)
    for module, norm in norms.items():
        _fuse_norm(module, norm, carried)
    mlps = sum(_fuse_mlp(module) for module in modules)
    return Fused(len(norms), sum(_fuse_rotation(module) for module in modules), mlps, blocks)


def _fuse_norm(module: nn.Module, norm: RmsNorm, carried: _Carried) -> None:
    own = module.forward

    def forward(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args or options or context.current().unfused:
            y: torch.Tensor = own(x, *args, **options)
            return y
        found = carried.take(module, x)
        return rms_norm(x, norm) if found is None else found

    module.forward = forward


def _fuse_mlp(module: nn.Module) -> bool:
    found, own = recognise.mlp(module), module.forward
    if found is None:
        return False
    projections, activation = found.projections, found.activation

    def forward(x: torch.Tensor) -> torch.Tensor:
        if context.current().unfused:
            y: torch.Tensor = own(x)
            return y
        parts = [module.get_submodule(name)(x) for name in projections]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        product = gated(gate, up, activation)
        del parts, gate, up
        out: torch.Tensor = module.get_submodule("down_proj")(product)
        return out

    module.forward = forward
    return True


def _fuse_rotation(module: nn.Module) -> bool:
    found, own = recognise.attention(module), module.forward
    if found is None:
        return False
    rotate = found.rotate

    def rotate_later(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Defers the rotation to the attention function, which has the values and the cache."""
        if cos.dtype != q.dtype:
            # Some families keep angles in float32 and round once, where the others round three times.
            return rotate(q, k, cos, sin)
        context.current().rotations.append(Rotation(cos, sin))
        return q, k

    rotated = found.rebound(rotate_later)

    def forward(*args: Any, **options: Any) -> Any:
        if context.current().unfused:
            return own(*args, **options)
        return rotated(module, *args, **options)

    module.forward = forward
    return True


def _fuse_layers(
    layers: list[nn.Module], last: nn.Module | None, norms: dict[nn.Module, RmsNorm], carried: _Carried
) -> int:
    """Fuses the recognised layers and returns their number. `last`: the norm after them, if known."""
    fused = 0
    firsts = [getattr(layer, "input_layernorm", None) for layer in layers[1:]]
    for layer, following in zip(layers, [*firsts, last], strict=True):
        block = recognise.block(layer)
        if block is None or following not in norms:
            continue
        names = (*block.norms, *(block.after or ()))
        if all(layer.get_submodule(name) in norms for name in names):
            _fuse_layer(layer, block, following, norms, carried)
            fused += 1
    return fused


def _fuse_layer(
    layer: nn.Module, block: Block, following: nn.Module, norms: dict[nn.Module, RmsNorm], carried: _Carried
) -> None:
    own = layer.forward
    first, second = (layer.get_submodule(name) for name in block.norms)
    after = [norms[layer.get_submodule(name)] for name in block.after] if block.after else [None, None]
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    before_mlp, before_next = norms[second], norms[following]

    def forward(hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args or context.current().unfused:
            y: torch.Tensor = own(hidden_states, *args, **options)
            return y
        # No names for intermediate tensors: a name would keep its tensor alive.
        stream, normed = add_rms_norm(
            attention(hidden_states=first(hidden_states), **options)[0],
            hidden_states,
            before_mlp,
            after=after[0],
        )
        stream, normed = add_rms_norm(mlp(normed), stream, before_next, after=after[1])
        carried.put(following, stream, normed)
        return stream

    layer.forward = forward
