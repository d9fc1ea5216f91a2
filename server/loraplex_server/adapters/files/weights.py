"""An adapter's weights as the device pool wants them: one flat host tensor, laid out, scaled and checked.

The file is read once, front to back, one tensor at a time. What is hashed is what is served, and a file that
is cut while it is read cannot kill the process as a memory map would.

The arithmetic is NumPy's: it runs on the loader's thread beside the engine's steps, and a torch operation
there would wake a second team of worker threads on the engine's cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from loraplex_kernels.pool import AdapterLayout, adapter_layout
from loraplex_server.adapters.files.folder import open_file
from loraplex_server.adapters.files.takers import Unused, find_takers
from loraplex_server.adapters.files.tensor_file import header_digest, read_header_bytes
from loraplex_server.adapters.spec.manifest import AdapterManifest
from loraplex_server.adapters.spec.refusals import MalformedFileError, refusal
from loraplex_server.core.frozen_base import FrozenBase


@dataclasses.dataclass(frozen=True, eq=False)
class HostBlob:
    """One adapter in host memory.

    Attributes:
        data: `[num_elements]` in the arena's dtype, pinned when the pool is on a GPU; blocks as in the
            layout, B scaled, everything else zero.
        content_hash: SHA-256 over the configuration and the weight file, in hex.
    """

    data: torch.Tensor
    content_hash: str


def lay_out(manifest: AdapterManifest, alignment: int, *, scaled: bool = False) -> AdapterLayout:
    """The layout of an adapter for a pool whose extents all begin at multiples of `alignment`; `scaled` for a
    pool in 8 bits.
    """
    return adapter_layout(
        manifest.shapes, alignment, manifest.vectors, scaled=scaled, bottleneck=manifest.bottleneck
    )


def read_weights(
    manifest: AdapterManifest,
    layout: AdapterLayout,
    dtype: torch.dtype,
    roots: Iterable[Path],
    base: FrozenBase | None = None,
    *,
    pin_memory: bool = False,
) -> HostBlob:
    """Reads, checks, scales and casts the weights that `manifest` describes.

    Alpha (and rsLoRA's root) is multiplied into B in float32 before the cast, and so is DoRA's magnitude over
    the norm of the adapted weight, which is worked out here, from `base`. Where the layout has scales,
    `dtype` is int8: each rank row of A and of B becomes integers of at most 127 in absolute value, rounded to
    nearest, and the product of the two rows' steps is the rank row's scale; vectors stay float32.

    Raises:
        FailedPreconditionError: the file is not the one the manifest was read from, or a tensor holds NaN or
            infinity, or would in `dtype`.
        PermissionDeniedError, UnavailableError: as for `read_manifest`.
    """
    if layout.entries and bool(layout.scale_offset) != (dtype == torch.int8):
        raise ValueError(f"the layout has {len(layout.scale_offset)} blocks of scales, but dtype is {dtype}")
    data = torch.zeros(layout.num_elements, dtype=dtype, pin_memory=pin_memory)
    elements = data.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else data.numpy()
    takers = find_takers(manifest, elements, layout, base)
    content = hashlib.sha256(manifest.config.encode() + b"\0")
    file, size = open_file(manifest.folder, manifest.weights_file, roots)
    try:
        with file:
            header, header_bytes = manifest.header, read_header_bytes(file, size)
            if header_digest(header_bytes) != header.digest or size != header.file_bytes:
                raise MalformedFileError(
                    f"{manifest.weights_file} was changed since it was registered; load it anew"
                )
            content.update(header_bytes)
            for tensor in header.tensors:
                raw = _read(file, tensor.end - tensor.begin)
                content.update(raw)
                for taker in takers.get(tensor.name, (Unused(),)):
                    taker.take(tensor, raw)
    except MalformedFileError as error:
        raise refusal(manifest.name, str(error)) from error
    return HostBlob(data, content.hexdigest())


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise MalformedFileError("the weight file ended while it was read")
    return data
