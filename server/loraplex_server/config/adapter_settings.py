"""Settings of adapters: their origins, and the memory and disk space that they get."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from loraplex_server.config.declared import check
from loraplex_server.config.kinds import Count, ExistingFolders, OptionalFolder, Seconds, Size, Texts
from loraplex_server.config.setting import NOT_NEGATIVE, POSITIVE, SECONDS, Group, Setting
from loraplex_server.core.errors import InvalidArgumentError
from loraplex_server.core.source_uri import AllowedSources

AdapterDtype = Literal["auto", "int8"]

_EXTRA_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.(json|jinja|txt)")

_adapters = partial(Setting, group=Group.ADAPTERS)
_remote = partial(Setting, group=Group.REMOTE)
_uploads = partial(Setting, group=Group.UPLOADS)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Folders, addresses and uploads of adapters, and the memory and disk space that they get."""

    folders: Annotated[
        ExistingFolders,
        _adapters(
            name="adapters",
            help="each folder in DIR that has an adapter_config.json is an adapter of that name",
            detail="The server registers them at start.",
        ),
    ] = ()
    roots: Annotated[
        ExistingFolders,
        _adapters(
            name="adapter_root",
            help="clients may load adapters from folders under DIR",
            detail="They may load adapters from under the folders of `--adapters` too.",
        ),
    ] = ()
    device_bytes: Annotated[
        Size, _adapters(name="adapter_device_bytes", help="memory for adapters on the device", range=POSITIVE)
    ] = 256 << 20
    device_dtype: Annotated[
        AdapterDtype,
        _adapters(
            name="adapter_device_dtype",
            help="type of adapters on the device; auto is the type of the activations, int8 saves memory and "
            "is less exact",
            detail="Host memory holds them in the same type.",
        ),
    ] = "auto"
    host_bytes: Annotated[
        Size, _adapters(name="adapter_host_bytes", help="host memory for adapters", range=POSITIVE)
    ] = 1 << 30
    max_bytes: Annotated[
        Size,
        _adapters(
            name="adapter_max_bytes",
            help="most memory that one adapter may take, on the device or on the host; 0 is no limit",
            detail="Adapters with whole weights or token tables of their own can be large.",
            range=NOT_NEGATIVE,
        ),
    ] = 0
    max_on_device: Annotated[
        Count,
        _adapters(
            name="max_adapters_on_device",
            help="most adapters on the device, whatever their size; 0 is no limit",
            range=NOT_NEGATIVE,
            unit="adapters",
        ),
    ] = 0
    max_pinned: Annotated[
        Count,
        _adapters(
            name="max_pinned_adapters",
            help="most pinned adapters; 0 is all slots but one, which is the most possible",
            range=NOT_NEGATIVE,
            unit="adapters",
        ),
    ] = 0
    max_per_request: Annotated[
        Count,
        _adapters(
            name="max_adapters_per_request",
            help="most adapters that one request may name",
            range=POSITIVE,
            unit="adapters",
        ),
    ] = 8
    watch_s: Annotated[
        Seconds,
        _adapters(
            name="watch_adapters",
            help="look for new, changed and removed adapters in --adapters every S seconds",
            default="0, never",
            range=SECONDS,
        ),
    ] = 0.0

    sources: Annotated[
        Texts,
        _remote(
            name="adapter_source",
            help="adapters may be downloaded from addresses under PREFIX: s3://, gs://, az://, https:// or "
            "hf://",
            metavar="PREFIX",
            detail="Without it, no adapter is downloaded.",
        ),
    ] = ()
    cache_dir: Annotated[
        OptionalFolder,
        _remote(
            name="adapter_cache_dir",
            help="folder of downloaded and uploaded adapters",
            default="loraplex/adapters in the user's cache folder",
        ),
    ] = None
    cache_bytes: Annotated[
        Size,
        _remote(
            name="adapter_cache_bytes", help="disk space for downloaded and uploaded adapters", range=POSITIVE
        ),
    ] = 16 << 30
    download_max_bytes: Annotated[
        Size,
        _remote(
            name="adapter_download_max_bytes", help="most bytes of one downloaded adapter", range=POSITIVE
        ),
    ] = 4 << 30
    max_downloads: Annotated[
        Count,
        _remote(
            name="max_adapter_downloads", help="downloads that run at once", range=POSITIVE, unit="downloads"
        ),
    ] = 4
    require_commit: Annotated[
        bool,
        _remote(
            name="require_adapter_commit",
            help="adapters from the Hugging Face hub must name a commit, not a branch or tag",
        ),
    ] = False
    extra_files: Annotated[
        Texts,
        _remote(
            name="adapter_extra_file",
            help="small text file to download with each adapter that has it, such as chat_template.jinja or "
            "tokenizer.json",
            metavar="NAME",
        ),
    ] = ()

    allow_uploads: Annotated[bool, _uploads(help="clients may upload adapters; the cache keeps them")] = False
    upload_max_bytes: Annotated[Size, _uploads(help="most bytes of one uploaded adapter", range=POSITIVE)] = (
        1 << 30
    )
    max_uploads: Annotated[
        Count, _uploads(help="uploads that run at once", range=POSITIVE, unit="uploads")
    ] = 4
    max_uploaded: Annotated[
        Count,
        _uploads(
            name="max_uploaded_adapters",
            help="uploaded adapters that may be registered",
            range=POSITIVE,
            unit="adapters",
        ),
    ] = 256

    def __post_init__(self) -> None:
        check(self)
        AllowedSources(self.sources)
        for name in self.extra_files:
            if _EXTRA_FILE.fullmatch(name) is None or name.startswith("adapter_"):
                raise InvalidArgumentError.field(
                    "adapter_extra_file",
                    f"{name!r} is not the name of a .json, .jinja or .txt file, or begins with adapter_",
                )

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        """Every folder under which an adapter's source may lie."""
        return self.folders + self.roots
