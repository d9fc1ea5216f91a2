"""Reads the configuration of a bottleneck adapter as the `adapters` library (AdapterHub) saves it.

With h the output of attention or MLP, r the residual stream that it will be added to, and A(v) the adapter's
own down-projection, non-linearity, up-projection and factor, what is served is h + A(v):

- serial: v is h, or h + r with `original_ln_before` (a norm after the sub-block is then in the way, and
  refused);
- parallel: v is r.

All else that the library offers either does not change that (where the residuals are taken from, as long as
each is added once) or is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from loraplex_kernels.bottleneck import NON_LINEARITIES
from loraplex_kernels.pool import BottleneckReads
from loraplex_server.adapters.spec.kinds import BOTTLENECK_SETTINGS, Treatment, is_unset
from loraplex_server.adapters.spec.refusals import MalformedFileError, UnsupportedError
from loraplex_server.core.text import quoted

LIBRARY_MODELS = frozenset({"llama", "mistral"})
"""Models that the library knows without an interface file."""


_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Non-linearities by their names in files without a version, which an older library wrote."""

_MIN_FACTOR, _MAX_FACTOR = 1e-3, 1e9


@dataclass(frozen=True)
class SubBlock:
    """Attention or MLP, in the words of the library.

    Attributes:
        tensors: how its tensors are named, "attention_adapters" or "output_adapters".
        projection: path within a layer of the projection that ends it.
        norm: path within a layer of the module whose input is the residual stream; None if that is not known.
        norm_after: whether a norm follows the projection.
    """

    tensors: str
    projection: str
    norm: str | None
    norm_after: bool = False


@dataclass(frozen=True)
class BottleneckSettings:
    """A configuration that will be applied whole.

    Attributes:
        name: the adapter's name in the names of its tensors.
        model_type, hidden_size: of the model that it was made for.
        layers: path of the list of layers, as its tensors are named.
        sub_blocks: where it has networks.
        left_out: layers without any.
        factors: reduction factor by layer; the one for all others under None.
        scaling: the factor, or "learned" or "channel" where the file has it.
        canonical: the whole configuration as sorted compact JSON, part of the adapter's identity.
    """

    name: str
    model_type: str
    hidden_size: int
    layers: str
    sub_blocks: tuple[SubBlock, ...]
    left_out: frozenset[int]
    factors: Mapping[int | None, float]
    non_linearity: str
    reads: BottleneckReads
    scaling: float | str
    canonical: str

    def width(self, layer: int) -> int:
        """Rows of the down-projection in a layer.

        Raises:
            UnsupportedError: the configuration does not say.
        """
        factor = self.factors.get(layer, self.factors.get(None))
        if factor is None:
            raise UnsupportedError(f"reduction_factor says nothing of layer {layer}")
        return max(1, int(self.hidden_size // factor))


def is_bottleneck(config: Mapping[str, Any]) -> bool:
    """True for a configuration of the `adapters` library rather than PEFT's."""
    return "peft_type" not in config and "config" in config


def parse_bottleneck(
    config: Mapping[str, Any], interface: Mapping[str, Any] | None, model_type: str
) -> BottleneckSettings:
    """The settings of a bottleneck adapter.

    Args:
        interface: the content of the file beside it that says how the model is built, if there is one.
        model_type: of the base that it is for.

    Raises:
        MalformedFileError: a setting has a wrong type.
        UnsupportedError: it is valid, but not all of it would be applied.
    """
    inner = config.get("config")
    if not isinstance(inner, dict):
        raise UnsupportedError(f"config has {quoted(inner)}; only one that is spelled out is served")
    architecture = inner.get("architecture")
    if architecture is not None:
        raise UnsupportedError(
            f"architecture {quoted(architecture)} of the adapters library is not served, only its bottleneck "
            "adapters are; LoRA, IA3, prompts and prefixes are taken as PEFT saves them"
        )
    for key, value in inner.items():
        _check_setting(key, value)
    name, made_for = config.get("name"), config.get("model_type")
    if not isinstance(name, str) or not name or not isinstance(made_for, str):
        raise MalformedFileError("name or model_type is missing; did the adapters library save this?")
    if made_for != model_type:
        raise UnsupportedError(f"it was made for model_type {quoted(made_for)}, the base is {model_type!r}")
    layers = _layers_of(interface, model_type)
    used = [
        sub_block
        for sub_block, key in ((layers.attention, "mh_adapter"), (layers.mlp, "output_adapter"))
        if _flag(inner, key, False)
    ]
    if not used:
        raise UnsupportedError("neither mh_adapter nor output_adapter is set: it does nothing")
    hooked = interface is not None
    reads = {_reads(inner, sub_block, hooked) for sub_block in used}
    if len(reads) > 1:
        raise UnsupportedError("its networks would read differently in attention and MLP")
    return BottleneckSettings(
        name=name,
        model_type=made_for,
        hidden_size=_size("hidden_size", config.get("hidden_size")),
        layers=layers.path,
        sub_blocks=tuple(used),
        left_out=_layers(inner),
        factors=_factors(inner.get("reduction_factor")),
        non_linearity=_non_linearity(inner, legacy="version" not in config),
        reads=reads.pop(),
        scaling=_scaling(inner),
        canonical=json.dumps([config, interface], sort_keys=True, separators=(",", ":")),
    )


def _check_setting(key: str, value: object) -> None:
    setting = BOTTLENECK_SETTINGS.get(key)
    if is_unset(value):
        return
    if setting is None:
        raise UnsupportedError(f"setting {quoted(key)} is not known, so it might not be applied")
    if setting.treatment is Treatment.REFUSED:
        raise UnsupportedError(f"{key} is not served: {setting.note}")


class _Layers(NamedTuple):
    """The path of the list of layers, and the sub-blocks of each."""

    path: str
    attention: SubBlock
    mlp: SubBlock


def _layers_of(interface: Mapping[str, Any] | None, model_type: str) -> _Layers:
    """The layers of the model that the adapter was made for."""
    if interface is None:
        if model_type not in LIBRARY_MODELS:
            raise UnsupportedError(
                f"adapter_interface.json is missing: without it the adapters library knows no {model_type!r}"
            )
        return _Layers(
            "layers",
            SubBlock("attention_adapters", "self_attn.o_proj", "input_layernorm"),
            SubBlock("output_adapters", "mlp.down_proj", "post_attention_layernorm"),
        )
    parts = interface.get("interface")
    if not isinstance(parts, dict):
        raise MalformedFileError("adapter_interface.json has no interface")

    def part(key: str) -> str | None:
        value = parts.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise MalformedFileError(
                f"{key} of adapter_interface.json has {quoted(value)}, which is not a path"
            )
        return value

    layers, attention, end = part("model_layers"), part("layer_self_attn"), part("attn_o_proj")
    output = part("layer_output_proj")
    if layers is None or attention is None or end is None or output is None:
        raise UnsupportedError("adapter_interface.json does not say where attention and MLP end")
    return _Layers(
        layers,
        SubBlock(
            "attention_adapters",
            f"{attention}.{end}",
            part("layer_pre_self_attn"),
            part("layer_ln_1") is not None,
        ),
        SubBlock("output_adapters", output, part("layer_pre_ffn"), part("layer_ln_2") is not None),
    )


def _reads(inner: Mapping[str, Any], sub_block: SubBlock, hooked: bool) -> BottleneckReads:
    """The input of the networks; `hooked` where the model itself adds the residual stream."""
    after = _flag(inner, "original_ln_after", True)
    if hooked and not after:
        raise UnsupportedError("original_ln_after false is not served: the model adds the residual itself")
    added = int(after)
    if _flag(inner, "is_parallel", False):
        if sub_block.norm is None:
            raise UnsupportedError("is_parallel needs a residual stream that adapter_interface.json names")
        reads = BottleneckReads.RESIDUAL
    else:
        before = _flag(inner, "original_ln_before", False) and sub_block.norm is not None
        if before and sub_block.norm_after:
            raise UnsupportedError(
                "original_ln_before is not served for a model with a norm after attention or MLP"
            )
        taken = inner.get("residual_before_ln", True)
        if not isinstance(taken, bool):
            raise UnsupportedError(f"residual_before_ln {quoted(taken)} needs a norm that the model has not")
        added += before and not taken
        reads = BottleneckReads.SUM if before else BottleneckReads.OUTPUT
    if added != 1:
        raise UnsupportedError(
            f"original_ln_before, original_ln_after and residual_before_ln add the residual {added} times "
            "in all, which is not served; once is"
        )
    return reads


def _non_linearity(inner: Mapping[str, Any], *, legacy: bool) -> str:
    value = inner.get("non_linearity")
    if not isinstance(value, str):
        raise MalformedFileError(f"non_linearity has {quoted(value)}, which is not a name")
    name = _RENAMED.get(value, value) if legacy else value
    if name.lower() not in NON_LINEARITIES:
        raise UnsupportedError(
            f"non_linearity {quoted(value)} is not served; these are: {', '.join(NON_LINEARITIES)}"
        )
    return name.lower()


def _factors(value: object) -> dict[int | None, float]:
    if not isinstance(value, dict):
        return {None: _factor("reduction_factor", value)}
    found: dict[int | None, float] = {}
    for key, factor in value.items():
        if key != "default" and not (key.isascii() and key.isdigit() and len(key) < 6):
            raise MalformedFileError(f"reduction_factor names {quoted(key)}, which is not a layer")
        found[None if key == "default" else int(key)] = _factor("reduction_factor", factor)
    return found


def _factor(key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and _MIN_FACTOR <= value <= _MAX_FACTOR:
        return value
    raise MalformedFileError(f"{key} has {quoted(value)}, which is not a usable factor")


def _scaling(inner: Mapping[str, Any]) -> float | str:
    value = inner.get("scaling", 1.0)
    if value in ("learned", "channel"):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FACTOR:
        raise MalformedFileError(f"scaling has {quoted(value)}, which is not a usable factor")
    return float(value)


def _layers(inner: Mapping[str, Any]) -> frozenset[int]:
    value = inner.get("leave_out")
    if value is None:
        return frozenset()
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise MalformedFileError(f"leave_out has {quoted(value)}, which is not a list of layers")
    return frozenset(value)


def _flag(inner: Mapping[str, Any], key: str, default: bool) -> bool:
    value = inner.get(key, default)
    if not isinstance(value, bool):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is neither true nor false")
    return value


def _size(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 24:
        raise MalformedFileError(f"{key} has {quoted(value)}, which is not a usable number")
    return value
