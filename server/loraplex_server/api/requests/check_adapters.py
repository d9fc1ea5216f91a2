"""Checks of adapter operations on the wire; each raises InvalidArgumentError with all violations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from loraplex.v1 import adapters_pb2
from loraplex_server.api.requests import bounds
from loraplex_server.api.requests.check import check_name
from loraplex_server.api.requests.enums import enum_text
from loraplex_server.api.requests.violations import Violations
from loraplex_server.core.adapter_files import MAX_CONFIG_BYTES, MAX_EXTRA_FILE_BYTES, TEXT_FILES
from loraplex_server.core.composition import COMBINATION_TYPES, MAJORITY_SIGNS, prunes

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def check_adapter_name(name: str) -> None:
    """Raises: InvalidArgumentError for a bad `name`."""
    found = Violations()
    check_name(found, "name", name)
    found.raise_any()


def check_load(message: adapters_pb2.LoadAdapterRequest) -> None:
    """Raises: InvalidArgumentError for a bad name or source."""
    found = Violations()
    check_name(found, "name", message.name)
    if not message.source:
        found.add("source", "is empty; name the folder that PEFT wrote")
    elif len(message.source) > bounds.MAX_SOURCE_CHARS or "\0" in message.source:
        found.add("source", f"is no path; it may have {bounds.MAX_SOURCE_CHARS} characters and no NUL")
    found.raise_any()


def check_unload(message: adapters_pb2.UnloadAdapterRequest) -> None:
    """Raises: InvalidArgumentError for a bad name, or a grace that is no time."""
    found = Violations()
    check_name(found, "name", message.name)
    if message.HasField("grace_seconds") and not 0 <= message.grace_seconds < math.inf:
        found.add("grace_seconds", "has to be 0 or more, and finite")
    found.raise_any()


def check_watch(message: adapters_pb2.WatchRequest) -> None:
    """Raises: InvalidArgumentError for bad names."""
    found = Violations()
    _check_names(found, message.names)
    found.raise_any()


def check_prefetch(message: adapters_pb2.PrefetchRequest) -> None:
    """Raises: InvalidArgumentError for bad names, none, or too many."""
    found = Violations()
    if not 1 <= len(message.names) <= bounds.MAX_PREFETCH:
        found.add("names", f"has {len(message.names)} names; give 1 to {bounds.MAX_PREFETCH}")
    _check_names(found, message.names[: bounds.MAX_PREFETCH])
    found.raise_any()


def check_composition(message: adapters_pb2.RegisterCompositionRequest) -> None:
    """Raises: InvalidArgumentError with one violation for each bad field; a parameter that the type does not
    have is one.
    """
    found = Violations()
    check_name(found, "name", message.name)
    kind = enum_text(adapters_pb2.CombinationType, message.combination_type)
    if kind not in COMBINATION_TYPES:
        found.add("combination_type", f"is none of {', '.join(COMBINATION_TYPES)}")
    _check_members(found, message.members)
    _check_fit(found, message, kind)
    if message.HasField("density") and not 0 < message.density <= 1:
        found.add("density", "has to be above 0 and at most 1")
    if message.HasField("svd_rank") and message.svd_rank < 1:
        found.add("svd_rank", "has to be at least 1")
    if message.HasField("seed") and message.seed >= 1 << 63:
        found.add("seed", "has to be below 2 to the 63rd")
    sign = enum_text(adapters_pb2.MajoritySign, message.majority_sign)
    if sign not in ("unspecified", *MAJORITY_SIGNS):
        found.add("majority_sign", f"is none of {', '.join(MAJORITY_SIGNS)}")
    elif sign != "unspecified" and "ties" not in kind:
        found.add("majority_sign", f"is for ties types, not for {kind}")
    found.raise_any()


def check_upload_header(header: adapters_pb2.UploadHeader, max_bytes: int) -> None:
    """Raises: InvalidArgumentError with one violation for each bad field."""
    found = Violations()
    check_name(found, "header.name", header.name)
    if not 1 <= len(header.config.encode()) <= MAX_CONFIG_BYTES:
        found.add("header.config", f"has to have 1 to {MAX_CONFIG_BYTES} bytes")
    _check_digest(found, "header.sha256", header.sha256)
    if not 1 <= header.size <= max_bytes:
        found.add(
            "header.size", f"is {header.size}; this server takes 1 to {max_bytes} bytes (--upload-max-bytes)"
        )
    names = [file.name for file in header.files]
    for index, file in enumerate(header.files):
        field = f"header.files[{index}]"
        if file.name not in TEXT_FILES or names.index(file.name) != index:
            found.add(f"{field}.name", f"has to be one of {', '.join(TEXT_FILES)}, each once")
        _check_digest(found, f"{field}.sha256", file.sha256)
        if not 1 <= file.size <= MAX_EXTRA_FILE_BYTES:
            found.add(f"{field}.size", f"is {file.size}; one has 1 to {MAX_EXTRA_FILE_BYTES} bytes")
    if header.files and header.size + sum(file.size for file in header.files) > max_bytes:
        found.add("header.files", f"are with the weights more than {max_bytes} bytes (--upload-max-bytes)")
    found.raise_any()


def _check_names(found: Violations, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        check_name(found, f"names[{index}]", name)


def _check_digest(found: Violations, field: str, digest: str) -> None:
    if _SHA256.fullmatch(digest) is None:
        found.add(field, "has to be 64 hex digits")


def _check_members(found: Violations, members: Sequence[adapters_pb2.CompositionMember]) -> None:
    if not 1 <= len(members) <= bounds.MAX_MEMBERS:
        found.add("members", f"has {len(members)} adapters; give 1 to {bounds.MAX_MEMBERS}")
    names = [member.adapter for member in members]
    for index, member in enumerate(members[: bounds.MAX_MEMBERS]):
        field = f"members[{index}]"
        check_name(found, f"{field}.adapter", member.adapter)
        if member.HasField("weight") and not math.isfinite(member.weight):
            found.add(f"{field}.weight", "has to be finite")
        if member.adapter in names[:index]:
            found.add(f"{field}.adapter", f"{member.adapter!r} is named twice; add its weights up")


def _check_fit(found: Violations, message: adapters_pb2.RegisterCompositionRequest, kind: str) -> None:
    """Parameters have to be those of the combination type."""
    if prunes(kind) and not message.HasField("density"):
        found.add("density", f"is missing; {kind} keeps that part of the values")
    for field, fits, type_names in (
        ("density", prunes(kind), "ties, dare and magnitude_prune types"),
        ("svd_rank", kind.endswith("svd"), "svd types"),
        ("seed", kind.startswith("dare"), "dare types"),
    ):
        if message.HasField(field) and not fits:
            found.add(field, f"is for {type_names}, not for {kind or 'none'}")
