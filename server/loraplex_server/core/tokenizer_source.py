"""The location of an adapter's tokenizer."""

from __future__ import annotations

import msgspec


class TokenizerFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a tokenizer, with the fields that reveal a change."""

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int


class TokenizerSource(msgspec.Struct, frozen=True, array_like=True):
    """The tokenizer that an adapter brings.

    Attributes:
        folder: real path of the adapter's folder.
        added_tokens: number of token ids that the adapter adds to the base's vocabulary.
    """

    folder: str
    files: tuple[TokenizerFile, ...]
    added_tokens: int = 0
