"""Elements of a file's tensors as the arena holds them: float32, float16, bfloat16, or 8 bits and scales."""

from __future__ import annotations

from typing import Any

import numpy as np

from loraplex_kernels.pool import SCALE_BYTES
from loraplex_server.adapters.files.tensor_file import decode
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.adapters.spec.tensors import TensorInfo
from loraplex_server.core.frozen_base import Array
from loraplex_server.core.text import quoted


def finite(tensor: TensorInfo, raw: bytes) -> Array:
    values = decode(tensor.dtype, raw)
    if not np.isfinite(values).all():
        raise MalformedFileError(f"tensor {quoted(tensor.name)} holds NaN or infinity")
    return values.reshape(tensor.shape)


def write(target: np.ndarray[Any, Any], tensor: TensorInfo, values: Array) -> None:
    """Encodes `values` at the beginning of `target`."""
    if target.dtype == np.int8:
        target = target[: values.size * SCALE_BYTES].view(np.float32)
    with np.errstate(over="ignore"):
        encoded = encode(np.ascontiguousarray(values), target.dtype)
    if overflowed(encoded):
        raise too_large(tensor)
    target[: encoded.size] = encoded.ravel()


def too_large(tensor: TensorInfo) -> MalformedFileError:
    return MalformedFileError(
        f"tensor {quoted(tensor.name)} has values too large for the server's dtype; use --dtype float32"
    )


def quantize(rows: Array) -> tuple[np.ndarray[Any, np.dtype[np.int8]], Array]:
    """Each row as int8 times a step, which is positive: 1 for a row of zeros."""
    steps = np.abs(rows).max(axis=1) / np.float32(127)
    # So small a row that its step is no normal number counts as zero.
    steps[steps < np.finfo(np.float32).tiny] = 1
    return np.rint(rows / steps[:, None]).astype(np.int8), steps


def encode(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
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


def overflowed(encoded: np.ndarray[Any, Any]) -> bool:
    if encoded.dtype == np.uint16:
        return bool(((encoded & 0x7F80) == 0x7F80).any())
    return not bool(np.isfinite(encoded).all())
