"""From a folder that the `adapters` library saved to a bottleneck adapter's sites.

The tensors in the file are the truth, the configuration must agree with them, as for PEFT's (`manifest`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_kernels.pool import Bottleneck as BottleneckForm
from loraplex_kernels.pool import BottleneckReads
from loraplex_server.adapters.files.tensor_file import (
    MalformedFileError,
    TensorFileHeader,
    TensorInfo,
    parse_object,
    read_header,
)
from loraplex_server.adapters.origins.sources import head_refusal, open_file, pickle_refusal
from loraplex_server.adapters.spec.bottleneck_config import BottleneckSettings, SubBlock, parse_bottleneck
from loraplex_server.adapters.spec.declared import BottleneckSpec, SiteSpec
from loraplex_server.adapters.spec.peft_config import UnsupportedError
from loraplex_server.adapters.spec.sites import Entry, SiteRegistry
from loraplex_server.core.adapter_files import (
    BOTTLENECK_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    MAX_CONFIG_BYTES,
    PICKLE_FILES,
    WEIGHTS_FILE,
)
from loraplex_server.core.text import quoted

_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_SCALING = "scaling"
_PART = "|".join(re.escape(part) for part in (*_PARTS, _SCALING))


@dataclass(frozen=True)
class BottleneckFile:
    """A checked bottleneck adapter: what `AdapterManifest` has of it.

    Attributes:
        config: canonical text of all that configures it.
        weights_file: name of the file that the header is of.
        sites: its networks by entry, ascending.
    """

    config: str
    weights_file: str
    header: TensorFileHeader
    sites: tuple[SiteSpec, ...]
    form: BottleneckForm


def read_bottleneck(
    config: Mapping[str, Any], folder: Path, registry: SiteRegistry, roots: tuple[Path, ...]
) -> BottleneckFile:
    """Checks everything that needs no weights.

    Raises:
        MalformedFileError, UnsupportedError: the adapter cannot be served whole.
        FailedPreconditionError, PermissionDeniedError, UnavailableError: as `open_file`.
    """
    for name in HEAD_FILES:
        if (folder / name).exists():
            raise UnsupportedError(head_refusal(name))
    settings = parse_bottleneck(config, _read_interface(folder, roots), registry.model_type)
    if settings.hidden_size != registry.hidden_size:
        raise UnsupportedError(
            f"hidden_size is {settings.hidden_size}, that of the base is {registry.hidden_size}"
        )
    # Where an adapter is uploaded, its file is named as PEFT's.
    name = WEIGHTS_FILE if (folder / WEIGHTS_FILE).exists() else BOTTLENECK_FILE
    header = _read_header(folder, name, roots)
    sites = _sites(settings, header, registry)
    widths = {site.entry.index: settings.width(site.entry.address.layer) for site in sites}
    form = BottleneckForm(settings.non_linearity, settings.reads, widths)
    return BottleneckFile(settings.canonical, name, header, sites, form)


def _read_interface(folder: Path, roots: tuple[Path, ...]) -> dict[str, Any] | None:
    if not (folder / INTERFACE_FILE).exists():
        return None
    file, size = open_file(folder, INTERFACE_FILE, roots)
    with file:
        if size > MAX_CONFIG_BYTES:
            raise MalformedFileError(
                f"{INTERFACE_FILE} has {size} bytes; at most {MAX_CONFIG_BYTES} are read"
            )
        return parse_object(file.read(MAX_CONFIG_BYTES), "the interface")


def _read_header(folder: Path, name: str, roots: tuple[Path, ...]) -> TensorFileHeader:
    if not (folder / name).exists():
        for pickle in PICKLE_FILES:
            if (folder / pickle).exists():
                raise UnsupportedError(pickle_refusal(pickle))
    file, size = open_file(folder, name, roots)
    with file:
        return read_header(file, size)


Place = tuple[str, int]
"""Name of a sub-block's tensors, and the layer."""


def _sites(
    settings: BottleneckSettings, header: TensorFileHeader, registry: SiteRegistry
) -> tuple[SiteSpec, ...]:
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
                f"tensor {quoted(tensor.name)} would not be applied: it is no part of a bottleneck adapter"
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
                f"{quoted(sub_block.norm)}, so what its network reads would be a guess"
            )
    return [found[layer] for layer in sorted(layers - settings.left_out)]


def _in_layer(path: str, layer: int) -> str:
    """What a path is within its layer."""
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
