"""The place of an adapter's tokenizer, as the engine tells it to the API."""

from __future__ import annotations

import msgspec


class TokenizerFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a tokenizer, with the values of `os.stat` by which a change is noticed."""

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int


class TokenizerSource(msgspec.Struct, frozen=True, array_like=True):
    """The tokenizer that an adapter brings.

    Attributes:
        folder: real path of the adapter's folder.
        files: the tokenizer's files in it.
        added_tokens: number of tokens that the adapter adds to the base's vocabulary.
    """

    folder: str
    files: tuple[TokenizerFile, ...]
    added_tokens: int = 0
