"""From an adapter's folder to its manifest: what it is and does, without reading its weights.

The tensors in the file are the truth, the configuration must agree with them: every tensor is the A or B of
an entry, every A has its B, shapes fit the entry, ranks are those of the configuration, and every module that
the configuration targets is there. Anything else is refused, because an adapter applied in part answers
wrongly without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loraplex_kernels.lora.layouts import EntryShape
from loraplex_server.adapters.effects import SERVED, LowRankAdd, SiteEffects
from loraplex_server.adapters.peft_config import (
    MAX_CONFIG_BYTES,
    LoraSettings,
    UnsupportedError,
    parse_config,
)
from loraplex_server.adapters.sites import Entry, LoraPart, SiteRegistry
from loraplex_server.adapters.sources import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, open_file
from loraplex_server.adapters.tensor_file import (
    MalformedFileError,
    TensorFileHeader,
    TensorInfo,
    quoted,
    read_header,
)
from loraplex_server.errors import FailedPreconditionError, ServerError


@dataclass(frozen=True)
class AdapterManifest:
    """A checked adapter.

    Attributes:
        folder: real path of the folder it was read from.
        peft_type: PEFT's name of the method, "LORA".
        config: canonical text of the configuration.
        header: the weight file's header; the weights are read only while it stays the same.
        sites: effects by entry, ascending.
    """

    name: str
    folder: Path
    peft_type: str
    config: str
    header: TensorFileHeader
    sites: tuple[SiteEffects, ...]

    @property
    def pairs(self) -> tuple[tuple[Entry, LowRankAdd], ...]:
        """Every low-rank pair with its entry."""
        return tuple(
            (site.entry, effect)
            for site in self.sites
            for effect in site.effects
            if isinstance(effect, LowRankAdd)
        )

    @property
    def rank(self) -> int:
        """Largest rank over its entries."""
        return max(pair.rank for _, pair in self.pairs)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last names of the modules it acts on, sorted."""
        return tuple(sorted({site.entry.path.rpartition(".")[2] for site in self.sites}))

    @property
    def shapes(self) -> tuple[EntryShape, ...]:
        """Its pairs as the pool lays them out."""
        return tuple(
            EntryShape(entry.index, entry.in_features, entry.out_features, pair.rank)
            for entry, pair in self.pairs
        )


def read_manifest(
    name: str, folder: Path, registry: SiteRegistry, roots: Iterable[Path], max_rank: int
) -> AdapterManifest:
    """Reads the configuration and the weight file's header, and checks everything that needs no weights.

    Raises:
        FailedPreconditionError: the adapter cannot be served whole; the text names the tensor or setting.
        PermissionDeniedError: a file lies outside `roots` after links are followed.
        UnavailableError: the file system failed.
    """
    roots = tuple(roots)
    try:
        settings = _read_settings(folder, roots)
        header = _read_weights_header(folder, roots)
        sites = _lora_sites(settings, header, registry, max_rank)
    except (MalformedFileError, UnsupportedError) as error:
        raise refusal(name, str(error)) from error
    except ServerError as error:
        raise type(error)(f"adapter {name!r}: {error}", resource=("adapter", name)) from error
    return AdapterManifest(name, folder, settings.peft_type, settings.canonical, header, sites)


def refusal(name: str, reason: str) -> FailedPreconditionError:
    """The error for an adapter that cannot be served, with the remedy in `reason`."""
    return FailedPreconditionError(f"adapter {name!r}: {reason}", resource=("adapter", name))


def _read_settings(folder: Path, roots: tuple[Path, ...]) -> LoraSettings:
    file, size = open_file(folder, CONFIG_FILE, roots)
    with file:
        if size > MAX_CONFIG_BYTES:
            raise MalformedFileError(f"{CONFIG_FILE} has {size} bytes; at most {MAX_CONFIG_BYTES} are read")
        return parse_config(file.read(MAX_CONFIG_BYTES))


def _read_weights_header(folder: Path, roots: tuple[Path, ...]) -> TensorFileHeader:
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists():
        raise UnsupportedError(
            f"{PICKLE_FILE} is a pickle, which can run code when it is read; re-save the adapter as "
            "safetensors (save_pretrained with safe_serialization=True)"
        )
    file, size = open_file(folder, WEIGHTS_FILE, roots)
    with file:
        return read_header(file, size)


def _lora_sites(
    settings: LoraSettings, header: TensorFileHeader, registry: SiteRegistry, max_rank: int
) -> tuple[SiteEffects, ...]:
    factors: dict[Entry, dict[LoraPart, TensorInfo]] = {}
    for tensor in header.tensors:
        located = registry.locate(tensor.name)
        if located is None:
            why = _why_not(tensor.name)
            raise UnsupportedError(f"tensor {quoted(tensor.name)} would not be applied: {why}")
        entry, part = located
        factors.setdefault(entry, {})[part] = tensor
    if not factors:
        raise UnsupportedError("the weight file holds no tensor")
    sites = tuple(
        SiteEffects(entry, (_pair(settings, entry, factors[entry], max_rank),))
        for entry in sorted(factors, key=lambda entry: entry.index)
    )
    for entry in registry:
        if entry not in factors and settings.target_modules is not None and settings.targets(entry.path):
            raise UnsupportedError(
                f"target_modules name {quoted(entry.path)}, but the file has no tensor for it; "
                "it was saved in part"
            )
    for site in sites:
        if any(not isinstance(effect, SERVED) for effect in site.effects):
            raise UnsupportedError(f"{quoted(site.entry.path)} needs an effect that is not served")
    return sites


def _pair(
    settings: LoraSettings, entry: Entry, factors: dict[LoraPart, TensorInfo], max_rank: int
) -> LowRankAdd:
    path = entry.path
    for part, other in ((LoraPart.A, LoraPart.B), (LoraPart.B, LoraPart.A)):
        if part not in factors:
            raise UnsupportedError(f"tensor {quoted(factors[other].name)} has no {part} beside it")
    a, b = factors[LoraPart.A], factors[LoraPart.B]
    if not settings.targets(path):
        raise UnsupportedError(
            f"tensor {quoted(a.name)} is for a module that target_modules leaves out; PEFT would ignore it"
        )
    rank = settings.rank_of(path)
    if rank > max_rank:
        raise UnsupportedError(f"tensor {quoted(a.name)} has rank {rank}; at most {max_rank} is served")
    if a.shape[:1] != (rank,):
        raise UnsupportedError(
            f"tensor {quoted(a.name)} has shape {list(a.shape)}, but the configuration gives it rank {rank}"
        )
    for tensor, expected in ((a, (rank, entry.in_features)), (b, (entry.out_features, rank))):
        if tensor.shape != expected:
            raise UnsupportedError(
                f"tensor {quoted(tensor.name)} has shape {list(tensor.shape)}, "
                f"the base model needs {list(expected)}"
            )
    return LowRankAdd(rank, settings.scale_of(path), a, b)


def _why_not(tensor_name: str) -> str:
    reasons = (
        ("lora_embedding_", "LoRA on embeddings is not served"),
        ("lora_magnitude_vector", "DoRA needs an output scale, which is not served"),
        (".lora_B.bias", "lora_bias is not served"),
        ("ia3_l", "IA3 needs input and output scales, which are not served"),
        ("prompt_embeddings", "soft prompts are not served"),
        ("embed_tokens", "embeddings of its own need a replacement, which is not served"),
        ("lm_head", "LoRA on, or a copy of, the output head is not served"),
        (".experts", "adapters on stacked experts are not served"),
        ("lora_", "the base model has no such module"),
    )
    return next((why for mark, why in reasons if mark in tensor_name), "it is no LoRA factor")
