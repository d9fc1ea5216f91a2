"""The tokenizer wrapper."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from loraplex_server.api.text.tokenizer import Tokenizer


def test_encodes_as_the_models_tokenizer_does_short_and_long(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    short, long = "hello dog", "the lazy café 龘 " * 500

    async def main() -> None:
        results = await asyncio.gather(*(tokenizer.encode(text) for text in [long, short] * 8))
        assert results == [tuple(hf_tokenizer.encode(text)) for text in [long, short] * 8]

    asyncio.run(main())


def test_decodes_without_special_tokens(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    ids = hf_tokenizer.encode("the café says hello")
    assert tokenizer.decode([*ids, hf_tokenizer.eos_token_id]) == "the café says hello"
    assert not tokenizer.has_text(hf_tokenizer.eos_token_id)
    assert not tokenizer.has_text(len(hf_tokenizer) + 3)
    assert tokenizer.has_text(ids[-1])
    assert tokenizer.token_text(hf_tokenizer.eos_token_id) == "</s>"


def test_loads_from_a_checkpoint(checkpoint: Path, byte_level_tokenizer: Any) -> None:
    loaded = Tokenizer.load(str(checkpoint))
    text = "hello world"
    assert asyncio.run(loaded.encode(text)) == tuple(byte_level_tokenizer.encode(text))
    longest = max(map(len, byte_level_tokenizer.get_vocab()))
    assert loaded.max_chars_per_token == min(longest, 32)
