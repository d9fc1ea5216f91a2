"""Named compositions: PEFT computes one adapter from several, in a process of its own, once.

The result is two files in the cache, as PEFT saves them, and from there on an adapter like any other. Its key
in the cache is made of the members' content and all parameters, so the same composition is found there again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraplex_server.adapters.files.folder import open_file
from loraplex_server.adapters.origins.remote.cache import entry_key
from loraplex_server.adapters.origins.resolver import Resolver
from loraplex_server.adapters.spec.declared import LoraSpec
from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.adapters.spec.refusals import refusal
from loraplex_server.adapters.spec.sites import SiteKind, SiteRegistry
from loraplex_server.core.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_server.core.composition import Composition
from loraplex_server.core.errors import (
    CancelledError,
    FailedPreconditionError,
    InternalError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
    disk_error,
)

_log = logging.getLogger(__name__)

_JOB = "loraplex_server.adapters.origins.composition_job"
_LOOK_EVERY_S = 0.2
"""Pause between two looks of a composition whether it is still wanted; it takes seconds."""

_READ_BYTES = 1 << 20

_MAX_WAITING = 8
"""Compositions that are made or wait. One runs at a time, so the last waits for seven others."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter of a composition; `content_hash` is "" if its weights were never read."""

    manifest: AdapterManifest
    content_hash: str


def check_member(manifest: AdapterManifest) -> None:
    """Raises FailedPreconditionError for an adapter whose combination PEFT does not define."""
    plain = all(type(effect) is LoraSpec for site in manifest.sites for effect in site.effects)
    if manifest.peft_type != "LORA" or not plain or manifest.invocation_tokens:
        raise refusal(
            manifest.name,
            "it is not a plain LoRA adapter; PEFT defines no combination of DoRA, lora_bias, activated LoRA "
            f"or {manifest.peft_type if manifest.peft_type != 'LORA' else 'the like'} with others",
        )


class Composer:
    """Makes compositions, one at a time. `make` may be called from any thread.

    Args:
        sites: of the base model, in the order of its modules.
        sources: whose cache keeps the results.
    """

    def __init__(self, sites: SiteRegistry, sources: Resolver) -> None:
        # In the order of the model's modules, in which PEFT draws. Norms are no place for what it combines.
        kinds = (SiteKind.EMBEDDING, SiteKind.PROJECTION, SiteKind.HEAD)
        self._sites = [
            (entry.path, entry.in_features, entry.out_features, kind is SiteKind.EMBEDDING)
            for kind in kinds
            for entry in sites.of_kind(kind)
        ]
        self._sources = sources
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(_MAX_WAITING)
        self._stop = threading.Event()

    def make(self, composition: Composition, members: Sequence[Member], unwanted: threading.Event) -> Path:
        """The folder with the result, held until it is released; computed unless the cache has it.

        Args:
            unwanted: once it is set, the computation ends with CancelledError.

        Raises:
            FailedPreconditionError: PEFT is not installed, or refuses to combine these.
            ResourceExhaustedError: too many others wait.
            ServerError: the files cannot be read or written.
        """
        files = [self._member(member) for member in members]
        spec = {
            "sites": self._sites,
            "members": files,
            "weights": [use.weight for use in composition.members],
            "combination_type": composition.combination_type,
            "density": composition.density,
            "majority_sign": composition.majority_sign,
            "svd_rank": composition.svd_rank,
            "seed": composition.seed,
        }
        contents = [{**member, "folder": ""} for member in files]
        key = entry_key("composition", _peft_version(), json.dumps({**spec, "members": contents}))
        with self._waiting(unwanted):
            folder = self._sources.landed(key)
            if folder is not None:
                return folder
            staged = self._sources.stage()
            try:
                self._run({**spec, "output": str(staged)}, unwanted)
                return self._sources.land(key, staged, str(composition))
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def close(self) -> None:
        """Ends what `make` is at, which raises UnavailableError."""
        self._stop.set()

    def _member(self, member: Member) -> dict[str, Any]:
        """A member's folder, the SHA-256 of its files, and the tensors that are the base's own."""
        manifest = member.manifest
        content = hashlib.sha256(manifest.config.encode() + b"\0")
        digests = {}
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            digest = hashlib.sha256()
            file, _ = open_file(manifest.folder, name, self._sources.roots)
            with file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
                    if name == WEIGHTS_FILE:
                        content.update(block)
            digests[name] = digest.hexdigest()
        if member.content_hash not in ("", content.hexdigest()):
            raise refusal(manifest.name, "its weights were changed on disk; load it in place first")
        base_tables = sorted({tensor.name for _, tensor in manifest.base_tables})
        return {"folder": str(manifest.folder), "base_tables": base_tables, **digests}

    @contextlib.contextmanager
    def _waiting(self, unwanted: threading.Event) -> Iterator[None]:
        """One at a time: each may need as much memory as its members and a layer's full delta."""
        if not self._places.acquire(blocking=False):
            raise ResourceExhaustedError(
                f"{_MAX_WAITING} compositions are being made or wait for it; try again later",
                resource=("jobs", "compositions"),
                retry_after_s=10.0,
                reason=Reason.TOO_MANY_JOBS,
            )
        try:
            while not self._turn.acquire(timeout=_LOOK_EVERY_S):
                self._check_wanted(unwanted)
            try:
                self._check_wanted(unwanted)
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def _run(self, spec: dict[str, Any], unwanted: threading.Event) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        text: str | None = json.dumps(spec)
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", _JOB],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            try:
                while True:
                    try:
                        out, log = process.communicate(text, timeout=_LOOK_EVERY_S)
                        break
                    except subprocess.TimeoutExpired:
                        text = None
                        self._check_wanted(unwanted)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            _log.error("a composition failed with exit code %d: %s", process.returncode, log[-2000:])
            raise InternalError(f"the composition's process ended with exit code {process.returncode}")
        told = json.loads(out)
        if failed := told["errno"]:
            raise disk_error("--adapter-cache-dir", OSError(failed, os.strerror(failed)))
        if refused := told["refused"]:
            raise FailedPreconditionError(f"PEFT cannot combine these adapters so: {refused}")

    def _check_wanted(self, unwanted: threading.Event) -> None:
        if self._stop.is_set():
            raise UnavailableError("the server stops")
        if unwanted.is_set():
            raise CancelledError("nobody waits for the composition any more")


def _peft_version() -> str:
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise FailedPreconditionError(
            "compositions are computed by the package peft, which the server does not have; "
            "in a checkout: pip install '.[compositions]'"
        ) from error
