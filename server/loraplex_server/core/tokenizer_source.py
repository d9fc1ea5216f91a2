"""Where the tokenizer of an adapter lies."""

from __future__ import annotations

import msgspec


class TokenizerFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a tokenizer, with what tells whether it is still the same."""

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int


class TokenizerSource(msgspec.Struct, frozen=True, array_like=True):
    """The tokenizer that an adapter brings.

    Attributes:
        folder: real path of the adapter's folder.
        added_tokens: how many token ids the adapter adds to the base's vocabulary.
    """

    folder: str
    files: tuple[TokenizerFile, ...]
    added_tokens: int = 0
