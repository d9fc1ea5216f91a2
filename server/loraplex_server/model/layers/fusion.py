"""Fused kernels for a transformers model's operations between its projections.

Each of these is one launch: an RMS norm with the addition to the residual stream before it, the rotation of
queries and keys with the write to the KV cache, and the gate of a feed-forward network. If an adapter acts in
between, on norms or on the residual stream, the step runs the model's own code (`StepContext.unfused`).
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
    """Number of modules that now use a fused kernel.

    Attributes:
        norms: RMS norms.
        attentions: attentions that rotate queries and keys while they write the KV cache.
        mlps: gated feed-forward networks.
        layers: decoder layers whose additions to the residual stream are part of the norms that follow.
    """

    norms: int
    attentions: int
    mlps: int
    layers: int

    def __str__(self) -> str:
        found = dataclasses.asdict(self)
        return ", ".join(f"{count} {name}" for name, count in found.items())


class _Carried:
    """A norm's output, computed together with the addition before it and kept until the norm is called."""

    def __init__(self) -> None:
        self._norm: nn.Module | None = None
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None

    def put(self, norm: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        """Keeps y, the norm of x, in place of what was kept before."""
        self._norm, self._x, self._y = norm, x, y

    def take(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The kept norm of x, which is then forgotten; None if another was kept."""
        found = self._y if self._norm is norm and self._x is x else None
        self._norm = self._x = self._y = None
        return found


def fuse(model: PreTrainedModel) -> Fused:
    """Replaces the forward passes of recognised modules; parameters and module paths do not change.

    Call it last: after everything else that wraps a norm, and when the weights are in their final place.
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
        """Defers the rotation to the attention function, which also has the values and the cache."""
        if cos.dtype != q.dtype:
            # Some families keep the angles in float32 and round once, where others round three times.
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
    """Fuses the layers that are recognised and returns their number.

    Args:
        last: the norm after the last layer; None if it is not known.
    """
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
        # Intermediate tensors get no names here, so that their memory is freed at once.
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
