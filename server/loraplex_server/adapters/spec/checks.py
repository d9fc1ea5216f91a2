"""Checks of a PEFT file's tensors against its configuration, and the effects that come out.

The tensors in the file are the truth, the configuration must agree with them: every tensor is a part of what
the method does at an entry, no part is missing, shapes fit the entry, ranks are those of the configuration,
and every module that the configuration targets is there. Anything else is refused, because an adapter applied
in part answers wrongly without anyone noticing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from loraplex_server.adapters.spec.declared import (
    BiasSpec,
    EffectSpec,
    InputScaleSpec,
    LoraSpec,
    MagnitudeSpec,
    OutputScaleSpec,
    OwnWeightSpec,
    PrefixSpec,
    SiteSpec,
    SoftPromptSpec,
    TokenRowsSpec,
)
from loraplex_server.adapters.spec.peft_config import (
    AdapterSettings,
    Ia3Settings,
    LoraSettings,
    NormSettings,
    PrefixSettings,
    PromptSettings,
    TokenSettings,
)
from loraplex_server.adapters.spec.refusals import UnsupportedError
from loraplex_server.adapters.spec.sites import Entry, Part, SiteKind, SiteRegistry
from loraplex_server.adapters.spec.tensors import TensorFileHeader, TensorInfo
from loraplex_server.adapters.spec.vocabulary import ChangedTokens, Parts, added_tokens, token_rows
from loraplex_server.core.text import quoted

_SOFT_PROMPT = "prompt_embeddings"

_TABLES = (Part.WEIGHT, Part.BASE, Part.TOKENS)


class Declared(NamedTuple):
    """Effects that a PEFT file declares.

    Attributes:
        prompt: what stands before every prompt.
        sites: effects by entry, ascending.
        rows: of the vocabulary, by entry; without tokens where the file's table is the base's.
    """

    prompt: SoftPromptSpec | PrefixSpec | None
    sites: tuple[SiteSpec, ...]
    rows: Mapping[Entry, TokenRowsSpec]


def check_tensors(
    settings: AdapterSettings,
    header: TensorFileHeader,
    registry: SiteRegistry,
    max_rank: int,
    changed_tokens: ChangedTokens,
) -> Declared:
    """The effects of the file with this configuration and header.

    Args:
        max_rank: largest rank that is served.
        changed_tokens: looks at a whole table of the vocabulary for the rows that are not the base's.

    Raises:
        UnsupportedError: not all of it would be applied; the text names the tensor or setting.
    """
    method = settings.method
    if isinstance(method, PromptSettings):
        return Declared(_soft_prompt(method, header, registry), (), {})
    if isinstance(method, PrefixSettings):
        return Declared(_prefix(method, header, registry), (), {})
    located = _located(header, registry)
    rows = token_rows(settings, located, registry, changed_tokens)
    return Declared(None, _sites(settings, located, rows, registry, max_rank), rows)


def _soft_prompt(
    settings: PromptSettings, header: TensorFileHeader, registry: SiteRegistry
) -> SoftPromptSpec:
    embeddings = _prompt_tensor(header)
    _check_shape(embeddings, (settings.num_virtual_tokens, registry.hidden_size))
    return SoftPromptSpec(embeddings)


def _prefix(settings: PrefixSettings, header: TensorFileHeader, registry: SiteRegistry) -> PrefixSpec:
    """PEFT saves the keys and values themselves, whatever made them in training."""
    keys_values = _prompt_tensor(header)
    if len(set(registry.kv_shapes)) != 1:
        raise UnsupportedError("prefix tuning is not served where layers have caches of different shapes")
    (heads, head_dim), num_layers = registry.kv_shapes[0], len(registry.kv_shapes)
    row_length = heads * head_dim
    for key, given, expected in (
        ("num_layers", settings.num_layers, num_layers),
        ("num_attention_heads", settings.num_heads, heads),
        ("token_dim", settings.width, row_length),
    ):
        if given not in (None, expected):
            raise UnsupportedError(f"{key} is {given}, the base model's keys and values need {expected}")
    _check_shape(keys_values, (settings.num_virtual_tokens, num_layers * 2 * row_length))
    return PrefixSpec(keys_values, row_length)


def _prompt_tensor(header: TensorFileHeader) -> TensorInfo:
    for tensor in header.tensors:
        if tensor.name != _SOFT_PROMPT:
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} would not be applied: it is not a soft prompt"
            )
    if not header.tensors:
        raise UnsupportedError(f"the weight file holds no {_SOFT_PROMPT}")
    (tensor,) = header.tensors
    return tensor


def _located(header: TensorFileHeader, registry: SiteRegistry) -> dict[Entry, dict[Part, TensorInfo]]:
    """Every tensor by its place. Those that have no effect are looked at for their names alone."""
    found: dict[Entry, dict[Part, TensorInfo]] = {}
    for tensor in header.tensors:
        located = registry.locate(tensor.name)
        if located is None:
            why = _why_not(tensor.name)
            raise UnsupportedError(f"tensor {quoted(tensor.name)} would not be applied: {why}")
        entry, part = located
        if part is Part.UNUSED:
            continue
        parts = found.setdefault(entry, {})
        if part in parts:
            raise UnsupportedError(f"tensors {quoted(parts[part].name)} and {quoted(tensor.name)} are one")
        parts[part] = tensor
    if not found:
        raise UnsupportedError("the weight file holds no tensor")
    return found


def _sites(
    settings: AdapterSettings,
    found: Mapping[Entry, Parts],
    rows: Mapping[Entry, TokenRowsSpec],
    registry: SiteRegistry,
    max_rank: int,
) -> tuple[SiteSpec, ...]:
    sites = []
    for entry in sorted({*found, *rows}, key=lambda entry: entry.index):
        parts, own = found.get(entry, {}), rows.get(entry)
        effects: tuple[EffectSpec, ...] = (own,) if own is not None and own.tokens else ()
        if entry.kind in (SiteKind.EMBEDDING, SiteKind.HEAD):
            parts = {part: tensor for part, tensor in parts.items() if part not in _TABLES}
        if Part.WEIGHT in parts or Part.WEIGHT_BIAS in parts:
            effects += (_own_weight(settings, entry, parts),)
        elif parts:
            effects += _on_the_base(settings, _widened(entry, own, registry), parts, registry, max_rank)
        if effects:
            sites.append(SiteSpec(entry, effects))
    _check_whole(settings, found, registry)
    return tuple(sites)


def _widened(entry: Entry, rows: TokenRowsSpec | None, registry: SiteRegistry) -> Entry:
    """The entry with the tokens that the adapter adds, as its pair has them."""
    added = added_tokens(rows, registry.vocabulary)
    if entry.kind is SiteKind.EMBEDDING:
        return dataclasses.replace(entry, in_features=entry.in_features + added)
    return dataclasses.replace(entry, out_features=entry.out_features + added)


def _includes(settings: AdapterSettings, entry: Entry, registry: SiteRegistry) -> bool:
    """True if the configuration's method is to act at an entry."""
    norms = isinstance(settings.method, NormSettings)
    if norms != (entry.kind is SiteKind.NORM):
        return False
    if entry.kind is SiteKind.HEAD and registry.tied and settings.replaced.tied:
        embeddings = registry.of_kind(SiteKind.EMBEDDING)
        if any(settings.targets.includes(embedding.path, linear=False) for embedding in embeddings):
            return True
    return settings.targets.includes(entry.path, linear=entry.kind is not SiteKind.EMBEDDING)


def _check_whole(settings: AdapterSettings, found: Mapping[Entry, Parts], registry: SiteRegistry) -> None:
    """Every module that the configuration names is in the file."""
    replaced = settings.replaced
    for name in replaced.modules:
        if not any(dataclasses.replace(replaced, modules=(name,)).saves(entry.path) for entry in registry):
            raise UnsupportedError(f"modules_to_save name {quoted(name)}, which the base has no copy for")
    for entry in registry:
        parts = found.get(entry, {})
        if replaced.saves(entry.path) and Part.WEIGHT not in parts:
            raise UnsupportedError(
                f"modules_to_save name {quoted(entry.path)}, but the file lacks it; it was saved in part"
            )
        if isinstance(settings.method, TokenSettings) or settings.targets.modules is None:
            continue
        at_work = parts.keys() - {Part.BASE, Part.TOKENS}
        if not at_work and _includes(settings, entry, registry):
            raise UnsupportedError(
                f"target_modules name {quoted(entry.path)}, but the file has no tensor for it; "
                "it was saved in part"
            )


def _own_weight(settings: AdapterSettings, entry: Entry, parts: Parts) -> OwnWeightSpec:
    other = next(iter(parts.values()))
    if isinstance(settings.method, NormSettings) and entry.kind is SiteKind.NORM:
        wanted = settings.targets.includes(entry.path)
    else:
        wanted = settings.replaced.saves(entry.path)
    if not wanted:
        raise UnsupportedError(
            f"tensor {quoted(other.name)} is a weight that modules_to_save leaves out; a change of the base "
            "itself is not served"
        )
    _check_parts(parts, {Part.WEIGHT, *((Part.WEIGHT_BIAS,) if entry.has_bias else ())}, "modules_to_save")
    weight, bias = parts[Part.WEIGHT], parts.get(Part.WEIGHT_BIAS)
    is_norm = entry.kind is SiteKind.NORM
    _check_shape(weight, (entry.out_features,) if is_norm else (entry.out_features, entry.in_features))
    if bias is not None:
        _check_shape(bias, (entry.out_features,))
    return OwnWeightSpec(weight, bias)


def _on_the_base(
    settings: AdapterSettings, entry: Entry, parts: Parts, registry: SiteRegistry, max_rank: int
) -> tuple[EffectSpec, ...]:
    """Effects of the configuration's method at an entry."""
    method, tensor = settings.method, next(iter(parts.values()))
    if not _includes(settings, entry, registry):
        raise UnsupportedError(
            f"tensor {quoted(tensor.name)} is for a module that target_modules leaves out; "
            "PEFT would ignore it"
        )
    if isinstance(method, Ia3Settings):
        return _ia3(method, entry, parts)
    if not isinstance(method, LoraSettings):
        raise UnsupportedError(f"tensor {quoted(tensor.name)} is not part of {settings.peft_type}")
    if method.invocation_tokens and entry.kind is not SiteKind.PROJECTION:
        raise UnsupportedError(
            f"tensor {quoted(tensor.name)}: alora_invocation_tokens are for the layers' projections"
        )
    if Part.BIAS in parts and entry.out_features != registry.entries[entry.index].out_features:
        raise UnsupportedError(
            f"tensor {quoted(parts[Part.BIAS].name)} is beside rows of added tokens, which is not served; "
            "save the head's pair without lora_bias"
        )
    return _lora(method, entry, parts, max_rank)


def _lora(settings: LoraSettings, entry: Entry, parts: Parts, max_rank: int) -> tuple[EffectSpec, ...]:
    needed = {Part.A, Part.B}
    needed |= {Part.MAGNITUDE} if settings.use_dora else set()
    needed |= {Part.BIAS} if settings.lora_bias else set()
    _check_parts(parts, needed, "use_dora, lora_bias")
    a, b = parts[Part.A], parts[Part.B]
    rank = settings.rank_of(entry.path)
    if rank > max_rank:
        raise UnsupportedError(f"tensor {quoted(a.name)} has rank {rank}; at most {max_rank} is served")
    if a.shape[:1] != (rank,):
        raise UnsupportedError(
            f"tensor {quoted(a.name)} has shape {list(a.shape)}, but the configuration gives it rank {rank}"
        )
    _check_shape(a, (rank, entry.in_features))
    _check_shape(b, (entry.out_features, rank))
    scale = settings.scale_of(entry.path)
    effects: list[EffectSpec] = [LoraSpec(rank, scale, a, b)]
    if settings.use_dora:
        _check_shape(parts[Part.MAGNITUDE], (entry.out_features,))
        effects.insert(0, MagnitudeSpec(parts[Part.MAGNITUDE]))
    if settings.lora_bias:
        _check_shape(parts[Part.BIAS], (entry.out_features,))
        effects.append(BiasSpec(scale, parts[Part.BIAS]))
    return tuple(effects)


def _ia3(settings: Ia3Settings, entry: Entry, parts: Parts) -> tuple[EffectSpec, ...]:
    _check_parts(parts, {Part.IA3}, "peft_type")
    scale = parts[Part.IA3]
    if not settings.is_feedforward(entry.path):
        _check_shape(scale, (entry.out_features, 1))
        return (OutputScaleSpec(scale),)
    _check_shape(scale, (1, entry.in_features))
    if entry.shares_input:
        raise UnsupportedError(
            f"tensor {quoted(scale.name)} scales an input that other projections share, which is not served; "
            "in feedforward_modules name a projection with an input of its own, such as down_proj"
        )
    return (InputScaleSpec(scale),)


def _check_parts(parts: Parts, needed: set[Part], settings: str) -> None:
    """All that is needed is there, and nothing else."""
    for part in sorted(needed - parts.keys()):
        other = next(iter(parts.values()))
        raise UnsupportedError(f"tensor {quoted(other.name)} has no {part} beside it")
    for part in sorted(parts.keys() - needed):
        raise UnsupportedError(
            f"tensor {quoted(parts[part].name)} is not asked for by the configuration; see {settings}"
        )


def _check_shape(tensor: TensorInfo, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise UnsupportedError(
            f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, "
            f"the base model needs {list(expected)}"
        )


def _why_not(tensor_name: str) -> str:
    reasons = (
        ("ia3_l", "the base model has no such module"),
        ("prompt_embeddings", "soft prompts come with a configuration of their own"),
        (".experts", "adapters on stacked experts are not served"),
        ("lora_", "the base model has no such module"),
    )
    no_part = "it is not part of an adapter that the base model has a place for"
    return next((why for mark, why in reasons if mark in tensor_name), no_part)
