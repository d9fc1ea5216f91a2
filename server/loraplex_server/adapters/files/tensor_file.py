"""Reads the header of a safetensors file, trusting nothing in it.

The format: 8 bytes little-endian header length, a JSON object naming each tensor's dtype, shape and byte
range, then the bytes. Only files whose ranges tile the rest exactly are accepted.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, BinaryIO

import numpy as np

from loraplex_server.adapters.spec.fields import parse_object
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.adapters.spec.tensors import TensorFileHeader, TensorInfo
from loraplex_server.core.text import quoted

MAX_HEADER_BYTES = 32 << 20
"""Largest header that is parsed. A LoRA on all 560 projections of an 80-layer model has 150 KB."""

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one element, by the dtypes that adapters may have."""


def read_header(file: BinaryIO, file_bytes: int) -> TensorFileHeader:
    """Reads and checks the header of a file of `file_bytes`, from its beginning.

    Raises:
        MalformedFileError: it is not what the format promises, or a dtype is not in `ITEM_BYTES`.
    """
    return parse_header(read_header_bytes(file, file_bytes), file_bytes)


def read_header_bytes(file: BinaryIO, file_bytes: int) -> bytes:
    """The bytes before the tensors, unchecked but for their number.

    Raises:
        MalformedFileError: the file is too short for what it promises, or the header is too long.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise MalformedFileError(f"the file has {len(prefix)} bytes and no header")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise MalformedFileError(f"the header claims {header_bytes} bytes; {MAX_HEADER_BYTES} is the limit")
    text = file.read(header_bytes)
    data_begin = 8 + header_bytes
    if len(text) < header_bytes or data_begin > file_bytes:
        raise MalformedFileError(f"the header claims {header_bytes} bytes, but the file ends before")
    return prefix + text


def parse_header(header: bytes, file_bytes: int) -> TensorFileHeader:
    """The header from the bytes that `read_header_bytes` gave, checked.

    Raises:
        MalformedFileError: as for `read_header`.
    """
    data_begin = len(header)
    tensors = []
    for name, description in parse_object(header[8:], "the header").items():
        if name != "__metadata__":
            tensors.append(_tensor(name, description, data_begin, file_bytes))
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = data_begin
    for tensor in tensors:
        if tensor.begin != position:
            raise MalformedFileError(
                f"tensor {quoted(tensor.name)} begins at byte {tensor.begin} where {position} was due"
            )
        position = tensor.end
    if position != file_bytes:
        raise MalformedFileError(f"the tensors end at byte {position} of {file_bytes}")
    return TensorFileHeader(tuple(tensors), data_begin, file_bytes, header_digest(header))


def header_digest(header: bytes) -> bytes:
    """`TensorFileHeader.digest` of these bytes."""
    return hashlib.sha256(header).digest()


def decode(dtype: str, raw: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The elements of a tensor's bytes, flat, as float32; `dtype` is one of `ITEM_BYTES`."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32, copy=False)


def _tensor(name: str, description: object, data_begin: int, file_bytes: int) -> TensorInfo:
    label = f"tensor {quoted(name)}"
    if not isinstance(description, dict) or set(description) != {"dtype", "shape", "data_offsets"}:
        raise MalformedFileError(f"{label} is not described by dtype, shape and data_offsets")
    dtype = description["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        allowed = ", ".join(ITEM_BYTES)
        raise MalformedFileError(f"{label} has dtype {quoted(dtype)}; re-save it as one of {allowed}")
    shape, offsets = _sizes(description["shape"]), _sizes(description["data_offsets"])
    if shape is None or len(shape) > 8:
        raise MalformedFileError(f"{label} has no valid shape")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedFileError(f"{label} has no valid data_offsets")
    begin, end = (data_begin + offset for offset in offsets)
    if end > file_bytes:
        raise MalformedFileError(f"{label} ends at byte {end} of a file of {file_bytes}; the file is cut")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise MalformedFileError(f"{label} of shape {list(shape)} in {dtype} cannot have {end - begin} bytes")
    return TensorInfo(name, dtype, shape, begin, end)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A tuple of whole numbers in 0..2**53, or None."""
    if not isinstance(value, list):
        return None
    if any(type(item) is not int or not 0 <= item <= 1 << 53 for item in value):
        return None
    return tuple(value)
