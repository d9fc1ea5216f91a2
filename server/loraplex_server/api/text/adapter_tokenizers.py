"""Tokenizers that adapters bring: loaded when first asked for, shared by all that bring the same.

Trainers save the tokenizer beside nearly every adapter. Most are the base's own, in all that matters for
text, and cost nothing; what is left are adapters with tokens of their own.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core.adapter_files import MAX_EXTRA_FILE_BYTES, TOKENIZER_FILE
from loraplex_server.core.errors import FailedPreconditionError, Reason
from loraplex_server.core.tokenizer_source import TokenizerFile, TokenizerSource

_MAX_KEPT_BYTES = 128 << 20
"""By the size of their files; in memory they take several times that."""
_MAX_REMEMBERED = 16_384

# Settings of text and special tokens that a class may be given; those that name files or code are left out.
_SETTINGS = re.compile(
    r"[a-z_]+_tokens?|add_prefix_space|added_tokens_decoder|clean_up_tokenization_spaces|legacy"
)

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class _Recent(Generic[KeyT, ValueT]):
    """Values that were used lately, up to a total size."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._entries: collections.OrderedDict[KeyT, tuple[ValueT, int]] = collections.OrderedDict()

    def get(self, key: KeyT) -> ValueT | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: KeyT, value: ValueT, size: int = 1) -> None:
        self._used += size - self._entries.pop(key, (value, 0))[1]
        self._entries[key] = (value, size)
        while self._used > self._capacity and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self._used -= freed


@dataclasses.dataclass(frozen=True)
class ChosenTokenizer:
    """The tokenizer of one request.

    Attributes:
        end_token_ids: end the answer, beside the model's own.
    """

    tokenizer: Tokenizer
    end_token_ids: tuple[int, ...] = ()


class AdapterTokenizers:
    """Belongs to one event loop; files are read, and tokenizers built, on threads.

    Args:
        base: the model's own.
        vocab_size: of the base; an adapter's added tokens follow.
        sources: what adapters bring, by name, as of now.
    """

    def __init__(
        self, base: Tokenizer, vocab_size: int, sources: Callable[[], Mapping[str, TokenizerSource]]
    ) -> None:
        self._base = ChosenTokenizer(base)
        self._vocab_size = vocab_size
        self._sources = sources
        self._digests: _Recent[tuple[TokenizerFile, ...], bytes] = _Recent(_MAX_REMEMBERED)
        self._plain: _Recent[bytes, bool] = _Recent(_MAX_REMEMBERED)
        self._kept: _Recent[bytes, Tokenizer] = _Recent(_MAX_KEPT_BYTES)
        self._loading: dict[tuple[TokenizerFile, ...], asyncio.Task[Tokenizer]] = {}

    async def of(self, adapters: Sequence[str]) -> ChosenTokenizer:
        """The tokenizer for these adapters in one request: that of those that bring one, else the base's.

        Raises:
            FailedPreconditionError: they bring different ones, or one that cannot be used.
        """
        known = self._sources()
        if not known or not any(name in known for name in adapters):
            return self._base
        own: dict[Tokenizer, list[str]] = {}
        ends: set[int] = set()
        for name in adapters:
            if name not in known:
                continue
            source = known[name]
            if not source.added_tokens and not _is_whole(source):
                # Tokens without weights, such as for padding: no text needs them.
                continue
            tokenizer = await self._load(name, source)
            if tokenizer is self._base.tokenizer:
                continue
            own.setdefault(tokenizer, []).append(name)
            end = tokenizer.eos_token_id
            if end is not None and end < self._vocab_size + source.added_tokens:
                ends.add(end)
        if len(own) > 1:
            names = " and ".join(repr(group[0]) for group in own.values())
            raise FailedPreconditionError(
                f"adapters {names} bring different tokenizers, and a text has one; send them apart",
                resource=("tokenizer", names),
                reason=Reason.ADAPTERS_NOT_ADDABLE,
            )
        if not own:
            return self._base
        return ChosenTokenizer(next(iter(own)), tuple(sorted(ends - {self._base.tokenizer.eos_token_id})))

    async def close(self) -> None:
        """Waits for what is being loaded."""
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    async def _load(self, name: str, source: TokenizerSource) -> Tokenizer:
        digest = self._digests.get(source.files)
        if digest is not None:
            if self._plain.get(digest):
                return self._base.tokenizer
            if (kept := self._kept.get(digest)) is not None:
                return kept
        task = self._loading.get(source.files)
        if task is None:
            task = self._loading[source.files] = asyncio.create_task(self._fetch(source))
            task.add_done_callback(lambda _: self._loading.pop(source.files, None))
        try:
            # Others may wait for it, too, when this request is cancelled.
            return await asyncio.shield(task)
        except _UnusableError as error:
            raise FailedPreconditionError(
                f"adapter {name!r} brings a tokenizer of its own that cannot be used: {error}",
                resource=("adapter", name),
                reason=Reason.ADAPTER_NOT_SERVABLE,
            ) from error

    async def _fetch(self, source: TokenizerSource) -> Tokenizer:
        files = await asyncio.to_thread(_read, source)
        digest = hashlib.sha256()
        for name, body in sorted(files.items()):
            digest.update(f"{name} {len(body)} ".encode() + body)
        key = digest.digest()
        self._digests.put(source.files, key)
        if self._plain.get(key):
            return self._base.tokenizer
        if (kept := self._kept.get(key)) is not None:
            return kept
        base = self._base.tokenizer
        built = await asyncio.to_thread(_build, files, base)
        if built is base:
            self._plain.put(key, True)
        else:
            self._kept.put(key, built, sum(map(len, files.values())))
        return built


class _UnusableError(Exception):
    """A tokenizer cannot be used; the text says why, and what to do about it."""


def _is_whole(source: TokenizerSource) -> bool:
    return any(file.name == TOKENIZER_FILE for file in source.files)


def _read(source: TokenizerSource) -> dict[str, bytes]:
    """The files as they were when the adapter was checked."""
    if not _is_whole(source):
        raise _UnusableError(f"there is no {TOKENIZER_FILE}; save it with a fast tokenizer's save_pretrained")
    size = sum(file.size for file in source.files)
    if size > MAX_EXTRA_FILE_BYTES:
        raise _UnusableError(f"it has {size} bytes; at most {MAX_EXTRA_FILE_BYTES} are read")
    found = {}
    for file in source.files:
        try:
            # O_NONBLOCK: opening a pipe must not wait for a writer.
            descriptor = os.open(Path(source.folder, file.name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as opened:
                status = os.fstat(descriptor)
                now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if now != (file.device, file.inode, file.size, file.mtime_ns):
                    raise _UnusableError(f"{file.name} was changed on disk; load the adapter anew")
                found[file.name] = opened.read(file.size)
        except OSError as error:
            raise _UnusableError(f"{file.name} cannot be read ({error.strerror})") from error
    return found


def _build(files: Mapping[str, bytes], base: Tokenizer) -> Tokenizer:
    """The tokenizer in these files, or the base's where they say nothing else."""
    with tempfile.TemporaryDirectory(prefix="loraplex-tokenizer-") as folder:
        try:
            for name, body in files.items():
                text = body if name == TOKENIZER_FILE else json.dumps(_settings(name, body)).encode()
                Path(folder, name).write_bytes(text)
            built = base.sibling(folder)
        except _UnusableError:
            raise
        except Exception as error:
            raise _UnusableError(f"it is not one of the base's kind ({type(error).__name__})") from error
        except BaseException as error:
            # What panics in the tokenizers' library is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise _UnusableError("it is not one of the base's kind") from error
    if built.cutting != base.cutting:
        # Its regular expressions would run on every text, and some never finish.
        raise _UnusableError(
            "it cuts text by other rules than the base's; save the base's own, with the tokens added to it"
        )
    return base if built.fingerprint == base.fingerprint else built


def _settings(name: str, body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise _UnusableError(f"{name} is no JSON") from error
    if not isinstance(found, dict):
        raise _UnusableError(f"{name} is no JSON object")
    return {key: value for key, value in found.items() if _SETTINGS.fullmatch(key)}
