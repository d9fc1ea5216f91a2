"""From an adapter's folder to its manifest: what it is and does, without reading its weights.

One part of them is looked at: whole tables of the vocabulary, for the rows in which they are not the base's.

The tensors in the file are the truth, the configuration must agree with them: every tensor is a part of what
the method does at an entry, no part is missing, shapes fit the entry, ranks are those of the configuration,
and every module that the configuration targets is there. Anything else is refused, because an adapter applied
in part answers wrongly without anyone noticing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from loraplex_kernels.pool import Bottleneck as BottleneckForm
from loraplex_kernels.pool import EntryShape, VectorKind, VectorShape
from loraplex_server.adapters.files.bottleneck_file import read_bottleneck
from loraplex_server.adapters.files.chat_template import read_chat_template
from loraplex_server.adapters.files.own_tokenizer import find_tokenizer
from loraplex_server.adapters.files.tensor_file import (
    MalformedFileError,
    TensorFileHeader,
    TensorInfo,
    header_digest,
    parse_header,
    parse_object,
    read_header_bytes,
)
from loraplex_server.adapters.files.token_tables import changed_tokens
from loraplex_server.adapters.origins.sources import open_file, pickle_refusal
from loraplex_server.adapters.spec.bottleneck_config import is_bottleneck
from loraplex_server.adapters.spec.declared import (
    LINEAR,
    BiasSpec,
    BottleneckSpec,
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
    UnsupportedError,
    parse_config,
)
from loraplex_server.adapters.spec.sites import Entry, Part, SiteKind, SiteRegistry
from loraplex_server.adapters.spec.vocabulary import Parts, added_tokens, token_rows
from loraplex_server.core.adapter_files import CONFIG_FILE, MAX_CONFIG_BYTES, PICKLE_FILES, WEIGHTS_FILE
from loraplex_server.core.errors import FailedPreconditionError, Reason, ServerError
from loraplex_server.core.frozen_base import FrozenBase
from loraplex_server.core.text import quoted
from loraplex_server.core.tokenizer_source import TokenizerSource


@dataclass(frozen=True)
class AdapterManifest:
    """A checked adapter.

    Attributes:
        folder: real path of the folder it was read from.
        peft_type: PEFT's name of the method, "LORA", "IA3" …, or "BOTTLENECK" for AdapterHub's.
        config: canonical text of the configuration.
        header: the weight file's header; the weights are read only while it stays the same.
        sites: effects by entry, ascending.
        prompt: what stands before every prompt.
        invocation_tokens: where an activated LoRA begins to apply; empty for everywhere.
        added_tokens: how many token ids it adds to the base's vocabulary.
        base_tables: tables of the vocabulary in its file that are the base's own, with their places.
        bottleneck: the form of its networks, if it is a bottleneck adapter.
        weights_file: name of the file that the header is of.
        chat_template: jinja source that the adapter was trained with; "" where it brings none.
        tokenizer: that the adapter was trained with; None where it brings none.
        kind: the same object for all that differ in nothing but name, folder, what they bring for text, and
            weights.
    """

    name: str
    folder: Path
    peft_type: str
    config: str
    header: TensorFileHeader
    sites: tuple[SiteSpec, ...]
    prompt: SoftPromptSpec | PrefixSpec | None = None
    invocation_tokens: tuple[int, ...] = ()
    added_tokens: int = 0
    base_tables: tuple[tuple[Entry, TensorInfo], ...] = ()
    bottleneck: BottleneckForm | None = None
    weights_file: str = WEIGHTS_FILE
    chat_template: str = ""
    tokenizer: TokenizerSource | None = None
    kind: Kind | None = field(default=None, repr=False, compare=False)

    @property
    def num_virtual_tokens(self) -> int:
        match self.prompt:
            case SoftPromptSpec(tensor) | PrefixSpec(tensor):
                return tensor.shape[0]
        return 0

    @property
    def num_prefix_tokens(self) -> int:
        """Virtual tokens whose keys and values it brings itself."""
        return self.num_virtual_tokens if isinstance(self.prompt, PrefixSpec) else 0

    @property
    def pairs(self) -> tuple[tuple[Entry, LoraSpec], ...]:
        """Every low-rank pair with its entry."""
        return tuple(
            (site.entry, effect)
            for site in self.sites
            for effect in site.effects
            if isinstance(effect, LoraSpec)
        )

    @cached_property
    def rank(self) -> int:
        """Largest rank over its entries, 0 for a method without ranks."""
        if self.kind is not None:
            return self.kind.first.rank
        return max((pair.rank for _, pair in self.pairs), default=0)

    @cached_property
    def linear(self) -> bool:
        """Whether what it adds can be weighted, and added to what other adapters add."""
        if self.kind is not None:
            return self.kind.first.linear
        effects = [effect for site in self.sites for effect in site.effects]
        return self.prompt is None and all(isinstance(effect, LINEAR) for effect in effects)

    @cached_property
    def target_modules(self) -> tuple[str, ...]:
        """Last names of the modules it acts on, sorted."""
        if self.kind is not None:
            return self.kind.first.target_modules
        return tuple(sorted({site.entry.path.rpartition(".")[2] for site in self.sites}))

    @property
    def shapes(self) -> tuple[EntryShape, ...]:
        """Its pairs as the pool lays them out."""
        return tuple(
            EntryShape(entry.index, entry.in_features, entry.out_features, pair.rank)
            for entry, pair in self.pairs
        )

    @property
    def vectors(self) -> tuple[VectorShape, ...]:
        """Its vectors as the pool lays them out."""
        match self.prompt:
            case SoftPromptSpec(tensor):
                return (VectorShape(0, VectorKind.SOFT_PROMPT, tensor.shape[1], tensor.shape[0]),)
            case PrefixSpec(tensor, length):
                rows = tensor.shape[0] * (tensor.shape[1] // length)
                return (VectorShape(0, VectorKind.PREFIX, length, rows),)
        return tuple(
            vector
            for site in self.sites
            for effect in site.effects
            for vector in _vectors(site.entry, effect)
        )


def _vectors(entry: Entry, effect: EffectSpec) -> tuple[VectorShape, ...]:
    index, out_features = entry.index, entry.out_features
    match effect:
        case InputScaleSpec():
            return (VectorShape(index, VectorKind.INPUT_SCALE, entry.in_features),)
        case OutputScaleSpec():
            return (VectorShape(index, VectorKind.OUTPUT_SCALE, out_features),)
        case MagnitudeSpec():
            scale = VectorShape(index, VectorKind.OUTPUT_SCALE, out_features)
            # The base's bias is not scaled: what the scale takes from it, a bias gives back.
            return (scale, VectorShape(index, VectorKind.BIAS, out_features)) if entry.has_bias else (scale,)
        case BiasSpec():
            return (VectorShape(index, VectorKind.BIAS, out_features),)
        case OwnWeightSpec(weight, bias):
            rows = 1 if entry.kind is SiteKind.NORM else weight.shape[0]
            own = VectorShape(index, VectorKind.WEIGHT, weight.shape[-1], rows)
            return (own,) if bias is None else (own, VectorShape(index, VectorKind.WEIGHT_BIAS, out_features))
        case TokenRowsSpec(tokens):
            hidden = entry.out_features if entry.kind is SiteKind.EMBEDDING else entry.in_features
            return (VectorShape(index, VectorKind.TOKEN_ROWS, hidden, len(tokens), tokens),)
        case BottleneckSpec(down):
            width, hidden = down.shape
            return (
                VectorShape(index, VectorKind.DOWN, hidden, width),
                VectorShape(index, VectorKind.DOWN_BIAS, width),
                VectorShape(index, VectorKind.UP, hidden, width),
                VectorShape(index, VectorKind.UP_BIAS, hidden),
            )
        case LoraSpec():
            return ()


class Kind:
    """What adapters of equal configuration and header share; lives as long as one of them."""

    def __init__(self, first: AdapterManifest) -> None:
        self.first = first


KnownKinds = MutableMapping[bytes, Kind]
"""Kinds by digest of configuration and header, of one registry and largest rank."""


def read_manifest(
    name: str,
    folder: Path,
    registry: SiteRegistry,
    roots: Iterable[Path],
    max_rank: int,
    known: KnownKinds | None = None,
    base: FrozenBase | None = None,
) -> AdapterManifest:
    """Reads the configuration and the weight file's header, and checks everything that needs no weights.

    Adapters that were trained by one recipe have the same configuration and header, byte for byte. Where such
    a one is among those `known`, nothing has to be parsed, and all that is large is shared. A new kind is put
    there, unless what it is depends on its values.

    Args:
        base: what tables of the vocabulary are compared with; without it all their rows are the adapter's.

    Raises:
        FailedPreconditionError: the adapter cannot be served whole; the text names the tensor or setting.
        PermissionDeniedError: a file lies outside `roots` after links are followed.
        UnavailableError: the file system failed.
    """
    roots = tuple(roots)
    try:
        config = _read_config(folder, roots)
        as_object = parse_object(config, "the configuration")
        if is_bottleneck(as_object):
            found = read_bottleneck(as_object, folder, registry, roots)
            return AdapterManifest(
                name=name,
                folder=folder,
                peft_type="BOTTLENECK",
                config=found.config,
                header=found.header,
                sites=found.sites,
                bottleneck=found.form,
                weights_file=found.weights_file,
                chat_template=read_chat_template(folder, roots),
                tokenizer=find_tokenizer(folder, roots),
            )
        header_bytes, file_bytes = _read_weights_header(folder, roots)
        chat_template = read_chat_template(folder, roots)
        tokenizer = find_tokenizer(folder, roots)
        key = hashlib.sha256(config).digest() + header_digest(header_bytes) + file_bytes.to_bytes(8, "little")
        kind = None if known is None else known.get(key)
        if kind is not None:
            return replace(
                kind.first,
                name=name,
                folder=folder,
                chat_template=chat_template,
                tokenizer=tokenizer,
                kind=kind,
            )
        settings = parse_config(config)
        header = parse_header(header_bytes, file_bytes)
        method = settings.method
        prompt: SoftPromptSpec | PrefixSpec | None = None
        sites: tuple[SiteSpec, ...] = ()
        rows: dict[Entry, TokenRowsSpec] = {}
        compared: list[TensorInfo] = []
        if isinstance(method, PromptSettings):
            prompt = _soft_prompt(method, header, registry)
        elif isinstance(method, PrefixSettings):
            prompt = _prefix(method, header, registry)
        else:
            located = _located(header, registry)

            def changed(entry: Entry, table: TensorInfo) -> Sequence[int]:
                compared.append(table)
                return changed_tokens(folder, roots, base, entry, table)

            rows = token_rows(settings, located, registry, changed)
            sites = _sites(settings, located, rows, registry, max_rank)
    except (MalformedFileError, UnsupportedError) as error:
        raise refusal(name, str(error)) from error
    except ServerError as error:
        raise type(error)(f"adapter {name!r}: {error}", resource=("adapter", name)) from error
    manifest = AdapterManifest(
        name=name,
        folder=folder,
        peft_type=settings.peft_type,
        config=settings.canonical,
        header=header,
        sites=sites,
        prompt=prompt,
        invocation_tokens=method.invocation_tokens if isinstance(method, LoraSettings) else (),
        added_tokens=max((added_tokens(own, registry.vocabulary) for own in rows.values()), default=0),
        base_tables=tuple(
            (entry, own.table) for entry, own in rows.items() if not own.tokens and own.table is not None
        ),
        chat_template=chat_template,
        tokenizer=tokenizer,
    )
    if known is None or compared:
        return manifest
    known[key] = kind = Kind(manifest)
    return replace(manifest, kind=kind)


def refusal(name: str, reason: str) -> FailedPreconditionError:
    """The error for an adapter that cannot be served, with the remedy in `reason`."""
    return FailedPreconditionError(
        f"adapter {name!r}: {reason}", resource=("adapter", name), reason=Reason.ADAPTER_NOT_SERVABLE
    )


def _read_config(folder: Path, roots: tuple[Path, ...]) -> bytes:
    file, size = open_file(folder, CONFIG_FILE, roots)
    with file:
        if size > MAX_CONFIG_BYTES:
            raise MalformedFileError(f"{CONFIG_FILE} has {size} bytes; at most {MAX_CONFIG_BYTES} are read")
        return file.read(MAX_CONFIG_BYTES)


def _read_weights_header(folder: Path, roots: tuple[Path, ...]) -> tuple[bytes, int]:
    """The header's bytes, and those of the whole file."""
    if not (folder / WEIGHTS_FILE).exists():
        for name in PICKLE_FILES:
            if (folder / name).exists():
                raise UnsupportedError(pickle_refusal(name))
    file, size = open_file(folder, WEIGHTS_FILE, roots)
    with file:
        return read_header_bytes(file, size), size


_SOFT_PROMPT = "prompt_embeddings"


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
            raise UnsupportedError(f"tensor {quoted(tensor.name)} would not be applied: it is no soft prompt")
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


_TABLES = (Part.WEIGHT, Part.BASE, Part.TOKENS)


def _widened(entry: Entry, rows: TokenRowsSpec | None, registry: SiteRegistry) -> Entry:
    """The entry with the tokens that the adapter adds, as its pair has them."""
    added = added_tokens(rows, registry.vocabulary)
    if entry.kind is SiteKind.EMBEDDING:
        return dataclasses.replace(entry, in_features=entry.in_features + added)
    return dataclasses.replace(entry, out_features=entry.out_features + added)


def _includes(settings: AdapterSettings, entry: Entry, registry: SiteRegistry) -> bool:
    """Whether the configuration's method is to act at an entry."""
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
    """What the method of the configuration does at an entry."""
    method, tensor = settings.method, next(iter(parts.values()))
    if not _includes(settings, entry, registry):
        raise UnsupportedError(
            f"tensor {quoted(tensor.name)} is for a module that target_modules leaves out; "
            "PEFT would ignore it"
        )
    if isinstance(method, Ia3Settings):
        return _ia3(method, entry, parts)
    if not isinstance(method, LoraSettings):
        raise UnsupportedError(f"tensor {quoted(tensor.name)} is no part of {settings.peft_type}")
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
    no_part = "it is no part of an adapter that the base model has a place for"
    return next((why for mark, why in reasons if mark in tensor_name), no_part)
