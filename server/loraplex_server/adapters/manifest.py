"""From an adapter's folder to its manifest: what it is and does, without reading its weights.

The tensors in the file are the truth, the configuration must agree with them: every tensor is a part of what
the method does at an entry, no part is missing, shapes fit the entry, ranks are those of the configuration,
and every module that the configuration targets is there. Anything else is refused, because an adapter applied
in part answers wrongly without anyone noticing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from loraplex_kernels.lora.layouts import Bottleneck as BottleneckForm
from loraplex_kernels.lora.layouts import EntryShape, VectorKind, VectorShape
from loraplex_server.adapters.bottleneck_config import is_bottleneck
from loraplex_server.adapters.bottleneck_file import read_bottleneck
from loraplex_server.adapters.chat_template import read_chat_template
from loraplex_server.adapters.effects import (
    LINEAR,
    BiasAdd,
    Bottleneck,
    Effect,
    InputScale,
    LowRankAdd,
    Magnitude,
    OutputScale,
    Prefix,
    SiteEffects,
    SoftPrompt,
)
from loraplex_server.adapters.peft_config import (
    MAX_CONFIG_BYTES,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    Targets,
    UnsupportedError,
    parse_config,
)
from loraplex_server.adapters.sites import Entry, Part, SiteRegistry
from loraplex_server.adapters.sources import (
    CONFIG_FILE,
    PICKLE_FILES,
    WEIGHTS_FILE,
    open_file,
    pickle_refusal,
)
from loraplex_server.adapters.tensor_file import (
    MalformedFileError,
    TensorFileHeader,
    TensorInfo,
    header_digest,
    parse_header,
    parse_object,
    quoted,
    read_header_bytes,
)
from loraplex_server.errors import FailedPreconditionError, ServerError


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
        bottleneck: the form of its networks, if it is a bottleneck adapter.
        weights_file: name of the file that the header is of.
        chat_template: jinja source that the adapter was trained with; "" where it brings none.
        kind: the same object for all that differ in nothing but name, folder, chat template and weights.
    """

    name: str
    folder: Path
    peft_type: str
    config: str
    header: TensorFileHeader
    sites: tuple[SiteEffects, ...]
    prompt: SoftPrompt | Prefix | None = None
    invocation_tokens: tuple[int, ...] = ()
    bottleneck: BottleneckForm | None = None
    weights_file: str = WEIGHTS_FILE
    chat_template: str = ""
    kind: Kind | None = field(default=None, repr=False, compare=False)

    @property
    def num_virtual_tokens(self) -> int:
        match self.prompt:
            case SoftPrompt(tensor) | Prefix(tensor):
                return tensor.shape[0]
        return 0

    @property
    def num_prefix_tokens(self) -> int:
        """Virtual tokens whose keys and values it brings itself."""
        return self.num_virtual_tokens if isinstance(self.prompt, Prefix) else 0

    @property
    def pairs(self) -> tuple[tuple[Entry, LowRankAdd], ...]:
        """Every low-rank pair with its entry."""
        return tuple(
            (site.entry, effect)
            for site in self.sites
            for effect in site.effects
            if isinstance(effect, LowRankAdd)
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
            case SoftPrompt(tensor):
                return (VectorShape(0, VectorKind.SOFT_PROMPT, tensor.shape[1], tensor.shape[0]),)
            case Prefix(tensor, length):
                rows = tensor.shape[0] * (tensor.shape[1] // length)
                return (VectorShape(0, VectorKind.PREFIX, length, rows),)
        return tuple(
            vector
            for site in self.sites
            for effect in site.effects
            for vector in _vectors(site.entry, effect)
        )


def _vectors(entry: Entry, effect: Effect) -> tuple[VectorShape, ...]:
    index, out_features = entry.index, entry.out_features
    match effect:
        case InputScale():
            return (VectorShape(index, VectorKind.INPUT_SCALE, entry.in_features),)
        case OutputScale():
            return (VectorShape(index, VectorKind.OUTPUT_SCALE, out_features),)
        case Magnitude():
            scale = VectorShape(index, VectorKind.OUTPUT_SCALE, out_features)
            # The base's bias is not scaled: what the scale takes from it, a bias gives back.
            return (scale, VectorShape(index, VectorKind.BIAS, out_features)) if entry.has_bias else (scale,)
        case BiasAdd():
            return (VectorShape(index, VectorKind.BIAS, out_features),)
        case Bottleneck(down):
            width, hidden = down.shape
            return (
                VectorShape(index, VectorKind.DOWN, hidden, width),
                VectorShape(index, VectorKind.DOWN_BIAS, width),
                VectorShape(index, VectorKind.UP, hidden, width),
                VectorShape(index, VectorKind.UP_BIAS, hidden),
            )
        case LowRankAdd():
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
) -> AdapterManifest:
    """Reads the configuration and the weight file's header, and checks everything that needs no weights.

    Adapters that were trained by one recipe have the same configuration and header, byte for byte. Where such
    a one is among those `known`, nothing has to be parsed, and all that is large is shared. A new kind is put
    there.

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
            )
        header_bytes, file_bytes = _read_weights_header(folder, roots)
        chat_template = read_chat_template(folder, roots)
        key = hashlib.sha256(config).digest() + header_digest(header_bytes) + file_bytes.to_bytes(8, "little")
        kind = None if known is None else known.get(key)
        if kind is not None:
            return replace(kind.first, name=name, folder=folder, chat_template=chat_template, kind=kind)
        settings = parse_config(config)
        header = parse_header(header_bytes, file_bytes)
        method = settings.method
        prompt: SoftPrompt | Prefix | None = None
        sites: tuple[SiteEffects, ...] = ()
        if isinstance(method, PromptSettings):
            prompt = _soft_prompt(method, header, registry)
        elif isinstance(method, PrefixSettings):
            prompt = _prefix(method, header, registry)
        else:
            sites = _sites(settings.targets, method, header, registry, max_rank)
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
        chat_template=chat_template,
    )
    if known is None:
        return manifest
    known[key] = kind = Kind(manifest)
    return replace(manifest, kind=kind)


def refusal(name: str, reason: str) -> FailedPreconditionError:
    """The error for an adapter that cannot be served, with the remedy in `reason`."""
    return FailedPreconditionError(f"adapter {name!r}: {reason}", resource=("adapter", name))


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


Parts = Mapping[Part, TensorInfo]

_SOFT_PROMPT = "prompt_embeddings"


def _soft_prompt(settings: PromptSettings, header: TensorFileHeader, registry: SiteRegistry) -> SoftPrompt:
    embeddings = _prompt_tensor(header)
    _check_shape(embeddings, (settings.num_virtual_tokens, registry.hidden_size))
    return SoftPrompt(embeddings)


def _prefix(settings: PrefixSettings, header: TensorFileHeader, registry: SiteRegistry) -> Prefix:
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
    return Prefix(keys_values, row_length)


def _prompt_tensor(header: TensorFileHeader) -> TensorInfo:
    for tensor in header.tensors:
        if tensor.name != _SOFT_PROMPT:
            raise UnsupportedError(f"tensor {quoted(tensor.name)} would not be applied: it is no soft prompt")
    if not header.tensors:
        raise UnsupportedError(f"the weight file holds no {_SOFT_PROMPT}")
    (tensor,) = header.tensors
    return tensor


def _sites(
    targets: Targets,
    method: LoraSettings | Ia3Settings,
    header: TensorFileHeader,
    registry: SiteRegistry,
    max_rank: int,
) -> tuple[SiteEffects, ...]:
    found: dict[Entry, dict[Part, TensorInfo]] = {}
    for tensor in header.tensors:
        located = registry.locate(tensor.name)
        if located is None:
            why = _why_not(tensor.name)
            raise UnsupportedError(f"tensor {quoted(tensor.name)} would not be applied: {why}")
        entry, part = located
        found.setdefault(entry, {})[part] = tensor
    if not found:
        raise UnsupportedError("the weight file holds no tensor")
    sites = []
    for entry in sorted(found, key=lambda entry: entry.index):
        parts = found[entry]
        if not targets.includes(entry.path):
            tensor = next(iter(parts.values()))
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} is for a module that target_modules leaves out; "
                "PEFT would ignore it"
            )
        effects = (
            _lora(method, entry, parts, max_rank)
            if isinstance(method, LoraSettings)
            else _ia3(method, entry, parts)
        )
        sites.append(SiteEffects(entry, effects))
    for entry in registry:
        if entry not in found and targets.modules is not None and targets.includes(entry.path):
            raise UnsupportedError(
                f"target_modules name {quoted(entry.path)}, but the file has no tensor for it; "
                "it was saved in part"
            )
    return tuple(sites)


def _lora(settings: LoraSettings, entry: Entry, parts: Parts, max_rank: int) -> tuple[Effect, ...]:
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
    effects: list[Effect] = [LowRankAdd(rank, scale, a, b)]
    if settings.use_dora:
        _check_shape(parts[Part.MAGNITUDE], (entry.out_features,))
        effects.insert(0, Magnitude(parts[Part.MAGNITUDE]))
    if settings.lora_bias:
        _check_shape(parts[Part.BIAS], (entry.out_features,))
        effects.append(BiasAdd(scale, parts[Part.BIAS]))
    return tuple(effects)


def _ia3(settings: Ia3Settings, entry: Entry, parts: Parts) -> tuple[Effect, ...]:
    _check_parts(parts, {Part.IA3}, "peft_type")
    scale = parts[Part.IA3]
    if not settings.is_feedforward(entry.path):
        _check_shape(scale, (entry.out_features, 1))
        return (OutputScale(scale),)
    _check_shape(scale, (1, entry.in_features))
    if entry.shares_input:
        raise UnsupportedError(
            f"tensor {quoted(scale.name)} scales an input that other projections share, which is not served; "
            "in feedforward_modules name a projection with an input of its own, such as down_proj"
        )
    return (InputScale(scale),)


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
        ("lora_embedding_", "LoRA on embeddings is not served"),
        ("ia3_l", "the base model has no such module"),
        ("prompt_embeddings", "soft prompts come with a configuration of their own"),
        ("embed_tokens", "embeddings of its own need a replacement, which is not served"),
        ("lm_head", "LoRA on, or a copy of, the output head is not served"),
        (".experts", "adapters on stacked experts are not served"),
        ("lora_", "the base model has no such module"),
    )
    return next((why for mark, why in reasons if mark in tensor_name), "it is no LoRA factor")
