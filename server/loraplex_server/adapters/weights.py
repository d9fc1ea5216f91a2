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
from typing import Any, BinaryIO

import numpy as np
import torch

from loraplex_kernels.lora.layouts import AdapterLayout, adapter_layout
from loraplex_server.adapters.manifest import AdapterManifest, refusal
from loraplex_server.adapters.sources import WEIGHTS_FILE, open_file
from loraplex_server.adapters.tensor_file import MalformedFileError, TensorInfo, quoted, read_header

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    layout = adapter_layout(manifest.shapes, scaled=scaled)
    # Where the model's own alignment was given up as out of proportion, an adapter's is as well.
    return layout if alignment % layout.alignment == 0 else dataclasses.replace(layout, alignment=alignment)


def read_weights(
    manifest: AdapterManifest,
    layout: AdapterLayout,
    dtype: torch.dtype,
    roots: Iterable[Path],
    *,
    pin_memory: bool = False,
) -> HostBlob:
    """Reads, checks, scales and casts the weights that `manifest` describes.

    Alpha (and rsLoRA's root) is multiplied into B in float32 before the cast. Where the layout has scales,
    `dtype` is int8: each rank row of A and of B becomes integers of at most 127 in absolute value, rounded to
    nearest, and the product of the two rows' steps is the rank row's scale.

    Raises:
        FailedPreconditionError: the file is not the one the manifest was read from, or a tensor holds NaN or
            infinity, or would in `dtype`.
        PermissionDeniedError, UnavailableError: as for `read_manifest`.
    """
    if bool(layout.scale_offset) != (dtype == torch.int8) and layout.entries:
        raise ValueError(f"the layout has {len(layout.scale_offset)} blocks of scales, but dtype is {dtype}")
    data = torch.zeros(layout.num_elements, dtype=dtype, pin_memory=pin_memory)
    elements = data.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else data.numpy()
    blocks = _blocks(manifest, layout)
    content = hashlib.sha256(manifest.config.encode() + b"\0")
    file, size = open_file(manifest.folder, WEIGHTS_FILE, roots)
    try:
        with file:
            header = read_header(file, size)
            if header.digest != manifest.header.digest:
                raise MalformedFileError(f"{WEIGHTS_FILE} was changed since it was registered; load it anew")
            file.seek(0)
            content.update(_read(file, header.data_begin))
            for tensor in header.tensors:
                raw = _read(file, tensor.end - tensor.begin)
                content.update(raw)
                start, scale, scale_start = blocks[tensor.name]
                steps = _write(elements[start:], tensor, raw, scale)
                if steps is not None:
                    scales = elements[scale_start : scale_start + steps.nbytes].view(np.float32)
                    # The first of a pair finds zeros; no step is zero.
                    scales[:] = np.where(scales == 0, steps, scales * steps)
    except MalformedFileError as error:
        raise refusal(manifest.name, str(error)) from error
    return HostBlob(data, content.hexdigest())


def _blocks(manifest: AdapterManifest, layout: AdapterLayout) -> dict[str, tuple[int, float | None, int]]:
    """Where each tensor goes, for a B what to scale it with, and where in 8 bits the pair's scales go."""
    scale_offset = layout.scale_offset or (0,) * len(layout.entries)
    offsets = {
        shape.entry: places
        for shape, *places in zip(layout.entries, layout.a_offset, layout.b_offset, scale_offset, strict=True)
    }
    blocks: dict[str, tuple[int, float | None, int]] = {}
    for entry, pair in manifest.pairs:
        a_offset, b_offset, scales = offsets[entry.index]
        blocks[pair.a.name] = (a_offset, None, scales)
        blocks[pair.b.name] = (b_offset, pair.scale, scales)
    return blocks


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise MalformedFileError(f"{WEIGHTS_FILE} ended while it was read")
    return data


def _write(
    target: np.ndarray[Any, Any], tensor: TensorInfo, raw: bytes, scale: float | None
) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """Writes one tensor by rank rows; in 8 bits, returns the step of each, float32 `[rank]`."""
    values = _decode(tensor.dtype, raw)
    if not np.isfinite(values).all():
        raise MalformedFileError(f"tensor {quoted(tensor.name)} holds NaN or infinity")
    with np.errstate(over="ignore"):
        scaled = values if scale is None else values * np.float32(scale)
        encoded = scaled if target.dtype == np.int8 else _encode(scaled, target.dtype)
    if _overflowed(encoded):
        raise MalformedFileError(
            f"tensor {quoted(tensor.name)} has values too large for the server's dtype; use --dtype float32"
        )
    rows = encoded.reshape(tensor.shape)
    if scale is not None:
        rows = rows.T
    steps = None
    if target.dtype == np.int8:
        rows, steps = _quantize(rows)
    target[: rows.size].reshape(rows.shape)[...] = rows
    return steps


def _quantize(
    rows: np.ndarray[Any, np.dtype[np.float32]],
) -> tuple[np.ndarray[Any, np.dtype[np.int8]], np.ndarray[Any, np.dtype[np.float32]]]:
    """Each row as int8 times a step, which is positive: 1 for a row of zeros."""
    steps = np.abs(rows).max(axis=1) / np.float32(127)
    # So small a row that its step is no normal number counts as zero.
    steps[steps < np.finfo(np.float32).tiny] = 1
    return np.rint(rows / steps[:, None]).astype(np.int8), steps


def _decode(dtype: str, raw: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32, copy=False)


def _encode(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Finite float32 as float32, float16, or the bits of bfloat16 (uint16), rounded to nearest even."""
    if dtype != np.uint16:
        return values.astype(dtype)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _overflowed(encoded: np.ndarray[Any, Any]) -> bool:
    if encoded.dtype == np.uint16:
        return bool(((encoded & 0x7F80) == 0x7F80).any())
    return not bool(np.isfinite(encoded).all())
