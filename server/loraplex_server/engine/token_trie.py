"""The model's tokens as bytes, which grammars are written in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.engine.grammar_matcher import WORD_BITS

if TYPE_CHECKING:
    from llguidance import LLTokenizer, TokenizerWrapper


def load_token_trie(model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokens of the checkpoint at `model`, a folder or hub id; no code from it is run.

    Args:
        vocab_size: rows of the model's embedding; a tokenizer may know fewer tokens, or more.
        eos_token_ids: those that end an answer. Without any, a token stands for them that no model has.

    Returns:
        What llguidance asks for; the number of its tokens is a multiple of `WORD_BITS`.

    Raises:
        FailedPreconditionError: there is no tokenizer, or none whose tokens are known as bytes.
    """
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        raise FailedPreconditionError(
            "structured output needs llguidance; install loraplex-server with what it requires"
        ) from error
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise FailedPreconditionError("structured output needs the model's tokenizer: it has none") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FailedPreconditionError(
            "structured output needs a fast tokenizer (tokenizer.json), which this model has not"
        )
    backend.no_truncation()
    backend.no_padding()
    width = max(vocab_size, len(tokenizer))
    ends = list(eos_token_ids)
    if not ends:
        ends, width = [width], width + 1
    # Masks are then whole words.
    width = -(-width // WORD_BITS) * WORD_BITS
    try:
        decoder = json.loads(backend.to_str())["decoder"]
        if decoder is None or decoder["type"] == "Fuse":
            plain = cast("TokenizerWrapper", _PlainTokens(tokenizer, width, ends[0]))
            return LLTokenizer(plain, n_vocab=width, eos_token=ends)
        return LLTokenizer(backend.to_str(), n_vocab=width, eos_token=ends)
    except ValueError as error:
        raise FailedPreconditionError(
            f"the bytes of this tokenizer's tokens are not known, so no structure can be asked for: {error}"
        ) from error


class _PlainTokens:
    """A vocabulary whose tokens stand for themselves, under the names that llguidance looks for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, width: int, eos_token_id: int) -> None:
        self._backend = tokenizer.backend_tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [b""] * width
        for text, token_id in tokenizer.get_vocab().items():
            self.tokens[token_id] = text.encode()
        special = {index for index, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.special_token_ids = sorted({*special, *tokenizer.all_special_ids})

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        # A grammar may force a long text, and of the two ways to encode this one lets other threads run.
        (found,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(found.ids)
