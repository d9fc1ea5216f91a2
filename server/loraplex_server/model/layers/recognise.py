"""Recognition of the modules of a transformers model that a fused kernel can replace.

Names and classes differ between model families and releases, so they prove nothing. Instead, a copy of the
module, its children replaced by known functions, runs on random numbers. The module is recognised if its
output equals the fused kernel's formula bit for bit. Modules that are not recognised keep their own code.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from loraplex_kernels.attention.rotary.reference import rotate
from loraplex_kernels.gated import ACTIVATIONS, Activation
from loraplex_kernels.gated.reference import gated
from loraplex_kernels.norm import FORMS, RmsNorm
from loraplex_kernels.norm.reference import rms_norm

_log = logging.getLogger(__name__)

# bfloat16 shows where a module rounds; float32 shows that nothing else differs.
_DTYPES = (torch.bfloat16, torch.float32)
_ROTATE, _INTERFACE = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"

Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps (q, k, cos, sin) to the rotated q and k."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A module's output, and the output of the formula that it is compared with."""


@dataclasses.dataclass(frozen=True)
class Mlp:
    """``down_proj(activation(gate) * up)``.

    Attributes:
        projections: names of the gate projection and the up projection, or of one that holds both.
    """

    projections: tuple[str, ...]
    activation: Activation


@dataclasses.dataclass(frozen=True)
class Block:
    """A decoder layer: attention, then MLP, each between a norm and the addition to the residual stream.

    Attributes:
        norms: names of the norms before attention and before the MLP.
        after: names of the norms after attention and after the MLP; None if there are none.
    """

    norms: tuple[str, str]
    after: tuple[str, str] | None


_BLOCKS = (
    Block(("input_layernorm", "post_attention_layernorm"), None),
    Block(
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
)
_MLPS = (("gate_proj", "up_proj"), ("gate_up_proj",))


@torch.no_grad()
def norm(module: nn.Module) -> RmsNorm | None:
    """The RMS norm that `module` computes, with the module's weight; None if it computes something else."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or not isinstance(eps, float) or len(list(module.parameters())) > 1:
        return None
    for form in FORMS:
        if _same(module, (_norm_pair(module, RmsNorm(weight, eps, form), dtype) for dtype in _DTYPES)):
            return RmsNorm(weight, eps, form)
    return None


def _norm_pair(module: nn.Module, norm: RmsNorm, dtype: torch.dtype) -> Pair:
    draw, width = _Draw(), len(norm.weight)
    x, weight = draw(3, width, dtype=dtype), draw(width, dtype=dtype)
    made = _copy(module, {}, {"weight": nn.Parameter(weight, requires_grad=False)})
    return _call(made, x), rms_norm(x, dataclasses.replace(norm, weight=weight))


@torch.no_grad()
def mlp(module: nn.Module) -> Mlp | None:
    """The gated network that `module` computes; None if it computes something else."""
    for projections in _MLPS:
        if {*projections, "down_proj"} <= module._modules.keys():
            for activation in ACTIVATIONS:
                if _same(module, (_mlp_pair(module, projections, activation, dtype) for dtype in _DTYPES)):
                    return Mlp(projections, activation)
    return None


def _mlp_pair(
    module: nn.Module, projections: tuple[str, ...], activation: Activation, dtype: torch.dtype
) -> Pair:
    draw = _Draw()
    x, gate, up = (draw(3, 24, dtype=dtype) for _ in range(3))
    parts = (gate, up) if len(projections) == 2 else (torch.cat((gate, up), -1),)
    stubs = {name: _Given(x, part) for name, part in zip(projections, parts, strict=True)}
    return _call(_copy(module, {**stubs, "down_proj": nn.Identity()}), x), gated(gate, up, activation)


@torch.no_grad()
def block(module: nn.Module) -> Block | None:
    """The decoder layer that `module` computes; None if it computes something else.

    The layer must pass all its keyword arguments on to its attention.
    """
    for found in _BLOCKS:
        names = {*found.norms, *(found.after or ()), "self_attn", "mlp"}
        if names <= module._modules.keys() and _same(module, (_block_pair(module, found) for _ in range(1))):
            return found
    return None


def _block_pair(module: nn.Module, found: Block) -> Pair:
    draw, given = _Draw(), object()
    x = draw(1, 3, 8)
    first, second, after_attention, after_mlp, inner, mlp = (_Bent(draw(8)) for _ in range(6))
    attention = _Attention(inner)
    stubs = {**dict(zip(found.norms, (first, second), strict=True)), "self_attn": attention, "mlp": mlp}
    if found.after is not None:
        stubs |= dict(zip(found.after, (after_attention, after_mlp), strict=True))
    handed_on = {"position_embeddings": given, "position_ids": given, "further": given}
    computed = _call(
        _copy(module, stubs), x, attention_mask=None, past_key_values=None, use_cache=False, **handed_on
    )
    if handed_on.items() <= attention.given.items():
        out = inner(first(x))
        stream = x + (out if found.after is None else after_attention(out))
        out = mlp(second(stream))
        return computed, stream + (out if found.after is None else after_mlp(out))
    raise ValueError("a layer that keeps from its attention what it is given")


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention that rotates queries and keys and passes the results unchanged to the attention function.

    Attributes:
        rotate: the model's own rotation, which takes any dtypes.
        rebound: makes a copy of the forward pass with another rotation; its first argument is the module.
    """

    rotate: Rotate
    rebound: Callable[[Rotate], Callable[..., Any]]


def attention(module: nn.Module) -> Attention | None:
    """The attention that `module` computes; None if it computes something else.

    Its rotation must be "by halves" (value i is paired with i + half) when all its inputs have one dtype.
    """
    function = inspect.getattr_static(type(module), "forward", None)
    if not isinstance(function, types.FunctionType) or not (
        {_ROTATE, _INTERFACE} <= set(function.__code__.co_names) & function.__globals__.keys()
    ):
        return None
    forward, rotate = function, function.__globals__[_ROTATE]
    if not (isinstance(getattr(module, "layer_idx", None), int) and _rotates(rotate)):
        return None
    if not _hands_on(module, forward):
        return None
    return Attention(rotate, lambda other: _rebound(forward, {_ROTATE: other}))


@torch.no_grad()
def _rotates(function: Callable[..., Any]) -> bool:
    """True if `function` is the rotation by halves."""
    draw = _Draw()

    def pairs(dtype: torch.dtype, rotary: int) -> list[Pair]:
        q, k = draw(1, 4, 3, 16, dtype=dtype), draw(1, 2, 3, 16, dtype=dtype)
        cos, sin = draw(1, 3, rotary, dtype=dtype), draw(1, 3, rotary, dtype=dtype)
        found = function(q, k, cos, sin)
        wanted = [rotate(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (q, k)]
        return list(zip(found, wanted, strict=True))

    def partly(dtype: torch.dtype) -> list[Pair]:
        try:
            return pairs(dtype, 8)
        except RuntimeError:
            # This rotation takes whole heads only, and the model never rotates less.
            return []

    return _same(function, (pair for dtype in _DTYPES for pair in pairs(dtype, 16))) and _same(
        function, (pair for dtype in _DTYPES for pair in partly(dtype))
    )


@torch.no_grad()
def _hands_on(module: nn.Module, function: types.FunctionType) -> bool:
    """True if the attention function receives exactly the tensors that the rotation returned."""
    stubs: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        width = getattr(child, "out_features", None)
        stubs[name] = _Zeros(width) if isinstance(width, int) else nn.Identity()
    given: list[Pair] = []
    got: list[Pair] = []

    def rotation(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given.append((q.clone(), k.clone()))
        return given[-1]

    def attend(_: nn.Module, q: torch.Tensor, k: torch.Tensor, *__: Any, **___: Any) -> tuple[Any, None]:
        got.append((q, k))
        return q.transpose(1, 2), None

    interface = types.SimpleNamespace(get_interface=lambda *_: attend)
    try:
        _rebound(function, {_ROTATE: rotation, _INTERFACE: interface})(
            _copy(module, stubs),
            torch.zeros(1, 2, 8),
            position_embeddings=(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)),
            attention_mask=None,
            past_key_values=None,
        )
    except Exception as error:
        _log.debug("%s is not recognised: %s", type(module).__name__, error)
        return False
    return len(given) == len(got) == 1 and all(a is b for a, b in zip(given[0], got[0], strict=True))


def _rebound(function: types.FunctionType, names: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of `function` in which these global names have other values."""
    found = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _copy(
    module: nn.Module, stubs: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter] | None = None
) -> nn.Module:
    """A shallow copy of `module` with these children replaced, and its parameters if any are given."""
    made = copy.copy(module)
    made._modules = {**module._modules, **stubs}
    if parameters is not None:
        made._parameters = dict(parameters)
    return made


def _call(module: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
    """Calls the forward pass of the module's class, even if the instance has another one."""
    found: torch.Tensor = type(module).forward(module, *args, **options)
    return found


def _same(subject: object, pairs: Iterable[Pair]) -> bool:
    """True if both tensors of every pair have the same dtype and bits; False if computing a pair fails."""
    try:
        return all(isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    except Exception as error:
        _log.debug("%s is not recognised: %s", getattr(subject, "__name__", type(subject).__name__), error)
        return False


class _Draw:
    """Draws of normal random numbers, the same sequence for every instance."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(17)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)


class _Given(nn.Module):
    """Returns `out` for the tensor `x`; raises ValueError for any other."""

    def __init__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        super().__init__()
        self._x, self._out = x, out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self._x:
            raise ValueError("a projection of another input")
        return self._out


class _Bent(nn.Module):
    """A nonlinear elementwise function, which differs from vector to vector."""

    def __init__(self, vector: torch.Tensor) -> None:
        super().__init__()
        self._vector = vector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self._vector + 0.1)


class _Attention(nn.Module):
    """Calls `inner`, and records its keyword arguments."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        self.given = options
        return self.inner(hidden_states), None


class _Zeros(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self._width)
