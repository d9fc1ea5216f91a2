"""From an adapter's folder to its manifest, without reading its weights.

One part of them is looked at: whole tables of the vocabulary, for the rows in which they are not the base's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from loraplex_kernels.pool import Bottleneck as BottleneckForm
from loraplex_server.adapters.files.chat_template import read_chat_template
from loraplex_server.adapters.files.folder import open_file, read_file
from loraplex_server.adapters.files.own_tokenizer import find_tokenizer
from loraplex_server.adapters.files.tensor_file import header_digest, parse_header, read_header_bytes
from loraplex_server.adapters.files.token_tables import changed_tokens
from loraplex_server.adapters.spec.bottleneck_checks import check_bottleneck
from loraplex_server.adapters.spec.bottleneck_config import is_bottleneck, parse_bottleneck
from loraplex_server.adapters.spec.checks import check_tensors
from loraplex_server.adapters.spec.fields import parse_object
from loraplex_server.adapters.spec.manifest import AdapterManifest, Kind, KnownKinds
from loraplex_server.adapters.spec.peft_config import LoraSettings, parse_config
from loraplex_server.adapters.spec.refusals import (
    MalformedFileError,
    UnsupportedError,
    head_refusal,
    pickle_refusal,
    refusal,
)
from loraplex_server.adapters.spec.sites import Entry, SiteRegistry
from loraplex_server.adapters.spec.tensors import TensorInfo
from loraplex_server.adapters.spec.vocabulary import added_tokens
from loraplex_server.core.adapter_files import (
    BOTTLENECK_FILE,
    CONFIG_FILE,
    HEAD_FILES,
    INTERFACE_FILE,
    MAX_CONFIG_BYTES,
    PICKLE_FILES,
    WEIGHTS_FILE,
)
from loraplex_server.core.errors import ServerError
from loraplex_server.core.frozen_base import FrozenBase


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
        max_rank: largest rank that is served.
        base: what tables of the vocabulary are compared with; without it all their rows are the adapter's.

    Raises:
        FailedPreconditionError: the adapter cannot be served whole; the text names the tensor or setting.
        PermissionDeniedError: a file lies outside `roots` after links are followed.
        UnavailableError: the file system failed.
    """
    place = _Place(name, folder, tuple(roots))
    try:
        config = read_file(folder, CONFIG_FILE, place.roots, MAX_CONFIG_BYTES)
        settings = parse_object(config, "the configuration")
        if is_bottleneck(settings):
            return _read_bottleneck(place, settings, registry)
        return _read_peft(place, config, registry, max_rank, known, base)
    except (MalformedFileError, UnsupportedError) as error:
        raise refusal(name, str(error)) from error
    except ServerError as error:
        raise type(error)(f"adapter {name!r}: {error}", resource=("adapter", name)) from error


class _Place(NamedTuple):
    """The place of an adapter's files."""

    name: str
    folder: Path
    roots: tuple[Path, ...]


def _read_peft(
    place: _Place,
    config: bytes,
    registry: SiteRegistry,
    max_rank: int,
    known: KnownKinds | None,
    base: FrozenBase | None,
) -> AdapterManifest:
    name, folder, roots = place
    header_bytes, file_bytes = _read_header(place, WEIGHTS_FILE)
    chat_template, tokenizer = read_chat_template(folder, roots), find_tokenizer(folder, roots)
    key = hashlib.sha256(config).digest() + header_digest(header_bytes) + file_bytes.to_bytes(8, "little")
    kind = None if known is None else known.get(key)
    if kind is not None:
        return replace(
            kind.first, name=name, folder=folder, chat_template=chat_template, tokenizer=tokenizer, kind=kind
        )
    settings = parse_config(config)
    header = parse_header(header_bytes, file_bytes)
    compared: list[TensorInfo] = []

    def changed(entry: Entry, table: TensorInfo) -> Sequence[int]:
        compared.append(table)
        return changed_tokens(folder, roots, base, entry, table)

    found = check_tensors(settings, header, registry, max_rank, changed)
    method, rows = settings.method, found.rows
    manifest = AdapterManifest(
        name=name,
        folder=folder,
        peft_type=settings.peft_type,
        config=settings.canonical,
        header=header,
        sites=found.sites,
        prompt=found.prompt,
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


def _read_bottleneck(place: _Place, config: Mapping[str, Any], registry: SiteRegistry) -> AdapterManifest:
    name, folder, roots = place
    for head in HEAD_FILES:
        if (folder / head).exists():
            raise UnsupportedError(head_refusal(head))
    interface = None
    if (folder / INTERFACE_FILE).exists():
        interface = parse_object(read_file(folder, INTERFACE_FILE, roots, MAX_CONFIG_BYTES), "the interface")
    settings = parse_bottleneck(config, interface, registry.model_type)
    if settings.hidden_size != registry.hidden_size:
        raise UnsupportedError(
            f"hidden_size is {settings.hidden_size}, that of the base is {registry.hidden_size}"
        )
    # Where an adapter is uploaded, its file is named as PEFT's.
    weights_file = WEIGHTS_FILE if (folder / WEIGHTS_FILE).exists() else BOTTLENECK_FILE
    header = parse_header(*_read_header(place, weights_file))
    sites = check_bottleneck(settings, header, registry)
    widths = {site.entry.index: settings.width(site.entry.address.layer) for site in sites}
    return AdapterManifest(
        name=name,
        folder=folder,
        peft_type="BOTTLENECK",
        config=settings.canonical,
        header=header,
        sites=sites,
        bottleneck=BottleneckForm(settings.non_linearity, settings.reads, widths),
        weights_file=weights_file,
        chat_template=read_chat_template(folder, roots),
        tokenizer=find_tokenizer(folder, roots),
    )


def _read_header(place: _Place, weights_file: str) -> tuple[bytes, int]:
    """The bytes of the weight file's header, and the number of those of the whole file."""
    if not (place.folder / weights_file).exists():
        for pickle in PICKLE_FILES:
            if (place.folder / pickle).exists():
                raise UnsupportedError(pickle_refusal(pickle))
    file, size = open_file(place.folder, weights_file, place.roots)
    with file:
        return read_header_bytes(file, size), size
