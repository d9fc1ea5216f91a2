"""Tensors of an adapter's weight file, as its header declares them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; `begin` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFileHeader:
    """The header of a weight file.

    Attributes:
        tensors: in the order of their bytes, without gaps from `data_begin` to `file_bytes`.
        digest: SHA-256 of all bytes before `data_begin`.
    """

    tensors: tuple[TensorInfo, ...]
    data_begin: int
    file_bytes: int
    digest: bytes
