"""The model's tokenizer as the API uses it: encode prompts, decode windows of tokens."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any

# Encoding takes about 2 us a character at worst; longer texts would stall every open stream.
_ENCODE_INLINE_CHARS = 2_000
# No text worth serving averages longer tokens, though vocabularies hold runs of 100 spaces.
_MAX_CHARS_PER_TOKEN = 32


class Tokenizer:
    """Wraps a transformers tokenizer. Safe to use from the event loop and worker threads at once.

    Attributes:
        chat_template: jinja source, "" where the model has none.
        special_tokens: by name, such as "bos_token"; templates use them.
        eos_token_id: the tokenizer's end-of-sequence token; None where it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decode = _fastest_decode(tokenizer)
        # Of single tokens: as `token_text` and as `decode` has them.
        self._texts: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        special = {index for index, added in tokenizer.added_tokens_decoder.items() if added.special}
        special.update(tokenizer.all_special_ids)
        self._text_ids = frozenset(vocabulary.values()) - special
        longest = max((len(token) for token in vocabulary), default=1)
        self.max_chars_per_token = min(longest, _MAX_CHARS_PER_TOKEN)
        self.chat_template = _chat_template(tokenizer)
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.special_tokens: dict[str, str] = {
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """Loads the tokenizer of the checkpoint at `model`, a folder or hub id; no code from it is run."""
        from transformers import AutoTokenizer

        return cls(_settled(AutoTokenizer.from_pretrained(model)))

    def sibling(self, folder: str) -> Tokenizer:
        """The tokenizer in `folder`, read as this one was: by the same class, from local files alone.

        Raises:
            Exception: any, where it is none of that class.
        """
        kind = type(self._tokenizer)
        return Tokenizer(_settled(kind.from_pretrained(folder, local_files_only=True)))

    @functools.cached_property
    def cutting(self) -> str:
        """Rules by which text is cut and put together, as JSON; the vocabulary is no part of them."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return uuid.uuid4().hex
        whole = json.loads(backend.to_str())
        return json.dumps([whole.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for all that make the same tokens of any text, and the same text of any tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        whole = uuid.uuid4().hex if backend is None else backend.to_str()
        specials = (sorted(self._tokenizer.all_special_ids), sorted(self.special_tokens.items()))
        return hashlib.sha256(f"{specials} {whole}".encode(errors="replace")).hexdigest()

    async def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The prompt as the model expects it; a long one is encoded in a thread.

        Args:
            special: add what the tokenizer puts around a text (BOS); chat templates bring it themselves.
        """
        if len(text) <= _ENCODE_INLINE_CHARS:
            return self._encode(text, special)
        return await asyncio.to_thread(self._encode, text, special)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens left out, spaces as they are."""
        if len(token_ids) != 1:
            return self._decode(token_ids)
        text = self._alone.get(token_ids[0])
        if text is None:
            text = self._alone[token_ids[0]] = self._decode(token_ids)
        return text

    def has_text(self, token_id: int) -> bool:
        """True where `decode` can show the token: it is in the vocabulary and not special."""
        return token_id in self._text_ids

    def token_text(self, token_id: int) -> str:
        """One token decoded by itself, special ones included."""
        text = self._texts.get(token_id)
        if text is None:
            text = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
            self._texts[token_id] = text
        return text

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        # Length is the API's to judge, with an error that says so; transformers would log a warning.
        return tuple(self._tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"])


def _settled(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Fixed here once: changing either while another thread encodes is an error.
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _chat_template(tokenizer: Any) -> str:
    """The template for plain conversations, "" where there is none. A tokenizer may have several, by name."""
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else ""


def _fastest_decode(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer)._decode is PreTrainedTokenizerFast._decode:
        # The same call without 4 us of keyword handling, twice for every token generated.
        backend = tokenizer.backend_tokenizer
        return lambda token_ids: str(backend.decode(token_ids, skip_special_tokens=True))
    return lambda token_ids: str(
        tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
