"""Tokenizers trained here, as real ones are built; texts that are hard to cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from loraplex_server.api.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "SELECT name FROM users WHERE age > 30 ORDER BY name; -- it's only a query",
    "Zoë's naïve café: déjà vu, über, señor, façade. Grüße aus Köln!",
    "def f(x):\n    return x * 2  # two spaces  and\ttabs\n",
    "你好 世界 今天天气很好",
    "hello hello world world world the the the of of and and",
]
_SPECIAL = ["<s>", "</s>", "<unk>"]
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_PIECES = [
    *(
        "the quick  brown",
        " fox",
        "x",
        "\n",
        "\t ",
        "  ",
        "don't",
        "1234",
        "café",
        "naïve",
        "e\u0301",
        "n\u0303o",
    ),
    *(
        "你好",
        "世界",
        "龘",
        "日本語テキスト",
        "한국어",
        "привет",
        "עברית",
        "€",
        "\U0001d4b3",
        "🙂",
        "🇩🇪",
        "\u200d",
    ),
    *("👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈"),
]


def _byte_level() -> Any:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _metaspace_bpe() -> Any:
    """As Llama 2 and Mistral: spaces are U+2581, one before the text; bytes for what is not known."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = RawTokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(_CORPUS * 4, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in _BYTES:
        vocabulary[byte] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    raw = RawTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizer
    raw.add_special_tokens(_SPECIAL)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _metaspace_unigram() -> Any:
    """As T5 and Gemma: a unigram model, the metaspace pre-tokenizer, bytes for what is not known."""
    trained = RawTokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(_CORPUS * 4, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    pieces += [(byte, -20.0) for byte in _BYTES]
    raw = RawTokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    raw.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session", params=["byte_level_bpe", "metaspace_bpe", "metaspace_unigram"])
def hf_tokenizer(request: pytest.FixtureRequest) -> Any:
    """A transformers tokenizer of each family that models use."""
    build = {
        "byte_level_bpe": _byte_level,
        "metaspace_bpe": _metaspace_bpe,
        "metaspace_unigram": _metaspace_unigram,
    }
    return build[request.param]()


@pytest.fixture(scope="session")
def tokenizer(hf_tokenizer: Any) -> Tokenizer:
    return Tokenizer(hf_tokenizer)


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Any:
    return _byte_level()


@pytest.fixture(scope="session")
def random_text() -> Callable[[random.Random], str]:
    """Draws a text of words, code, CJK, combining marks and joined emoji."""

    def draw(rng: random.Random) -> str:
        return "".join(rng.choice(_PIECES) + rng.choice(["", " "]) for _ in range(rng.randint(1, 25)))

    return draw
