"""Checks of a bottleneck adapter's tensors against its configuration.

The tensors in the file are the truth, the configuration must agree with them, as for PEFT's (`checks`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loraplex_kernels.pool import BottleneckReads
from loraplex_server.adapters.spec.bottleneck_config import BottleneckSettings, SubBlock
from loraplex_server.adapters.spec.declared import BottleneckSpec, SiteSpec
from loraplex_server.adapters.spec.refusals import UnsupportedError
from loraplex_server.adapters.spec.sites import Entry, SiteRegistry
from loraplex_server.adapters.spec.tensors import TensorFileHeader, TensorInfo
from loraplex_server.core.text import quoted

_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")


_SCALING = "scaling"


_PART = "|".join(re.escape(part) for part in (*_PARTS, _SCALING))

Place = tuple[str, int]
"""Name of a sub-block's tensors, and the layer."""


def check_bottleneck(
    settings: BottleneckSettings, header: TensorFileHeader, registry: SiteRegistry
) -> tuple[SiteSpec, ...]:
    """Its networks by entry, ascending.

    Raises:
        UnsupportedError: not all of it would be applied; the text names the tensor or setting.
    """
    found: dict[Place, dict[str, TensorInfo]] = {}
    # Saved from a model without a head, paths begin at the list of layers.
    lists = {entry.path.partition(f".{entry.address.layer}.")[0] for entry in registry}
    paths = [path for path in (*lists, settings.layers) if f".{path}".endswith(f".{settings.layers}")]
    anywhere = "|".join(re.escape(path) for path in paths)
    pattern = re.compile(
        rf"(?:{anywhere})\.(\d{{1,5}})\.(\w+)\.adapters\.{re.escape(settings.name)}\.({_PART})",
        re.ASCII,
    )
    for tensor in header.tensors:
        match = pattern.fullmatch(tensor.name)
        if match is None:
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} would not be applied: it is not part of a bottleneck adapter"
            )
        parts = found.setdefault((match[2], int(match[1])), {})
        if match[3] in parts:
            raise UnsupportedError(f"tensor {quoted(tensor.name)} comes twice")
        parts[match[3]] = tensor
    sites = []
    for sub_block in settings.sub_blocks:
        for entry in _entries(sub_block, settings, registry):
            parts = found.pop((sub_block.tensors, entry.address.layer), {})
            sites.append(SiteSpec(entry, (_network(settings, entry, parts),)))
    for parts in found.values():
        tensor = next(iter(parts.values()))
        raise UnsupportedError(
            f"tensor {quoted(tensor.name)} is for a place that the configuration leaves out or the base lacks"
        )
    if not sites:
        raise UnsupportedError("leave_out leaves out every layer: it does nothing")
    return tuple(sorted(sites, key=lambda site: site.entry.index))


def _entries(sub_block: SubBlock, settings: BottleneckSettings, registry: SiteRegistry) -> list[Entry]:
    """The projections at which the networks of a sub-block stand, in layer order."""
    layers = {entry.address.layer for entry in registry if entry.address.layer >= 0}
    found = {
        entry.address.layer: entry
        for entry in registry
        if _in_layer(entry.path, entry.address.layer) == sub_block.projection
    }
    for layer in sorted(layers):
        entry = found.get(layer)
        if entry is None or entry.out_features != registry.hidden_size:
            raise UnsupportedError(
                f"layer {layer} of the base has no {quoted(sub_block.projection)} that ends in "
                "the hidden size"
            )
        norm = registry.residual.get(entry.path)
        known = None if norm is None else _in_layer(norm, layer)
        if settings.reads is not BottleneckReads.OUTPUT and known != sub_block.norm:
            raise UnsupportedError(
                f"the residual stream at {quoted(entry.path)} is not known to be what goes into "
                f"{quoted(sub_block.norm)}, so it is not known what its network reads"
            )
    return [found[layer] for layer in sorted(layers - settings.left_out)]


def _in_layer(path: str, layer: int) -> str:
    """The rest of a path after its layer."""
    return path.partition(f".{layer}.")[2]


def _network(settings: BottleneckSettings, entry: Entry, parts: Mapping[str, TensorInfo]) -> BottleneckSpec:
    needed = {*_PARTS, *((_SCALING,) if isinstance(settings.scaling, str) else ())}
    for part in sorted(needed - parts.keys()):
        raise UnsupportedError(f"the file has no {part} for {quoted(entry.path)}; it was saved in part")
    for part in sorted(parts.keys() - needed):
        raise UnsupportedError(f"tensor {quoted(parts[part].name)} is not asked for by the configuration")
    width, hidden = settings.width(entry.address.layer), settings.hidden_size
    down, down_bias, up, up_bias = (parts[part] for part in _PARTS)
    expected = {down: (width, hidden), down_bias: (width,), up: (hidden, width), up_bias: (hidden,)}
    if isinstance(settings.scaling, str):
        expected[parts[_SCALING]] = (hidden,) if settings.scaling == "channel" else (1,)
    for tensor, shape in expected.items():
        if tensor.shape != shape:
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, "
                f"the base model and reduction_factor need {list(shape)}"
            )
    scale = parts[_SCALING] if isinstance(settings.scaling, str) else settings.scaling
    return BottleneckSpec(down, down_bias, up, up_bias, scale)
