"""The demo model's tokenizer and architecture, before training."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

MAX_MODEL_LENGTH = 512
"""Longest sequence in tokens the demo model's configuration admits."""

_PAD, _BOS, _EOS, _UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_SPECIALS = [_PAD, _BOS, _EOS, _UNK]
_CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer over printable ASCII and the newline, which puts `<bos>` before every text."""
    tokens = [*_SPECIALS, *_CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=_UNK)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        unk_token=_UNK,
        model_max_length=MAX_MODEL_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of about 1.6 million parameters with grouped-query attention (6 query heads on 2 KV heads)."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
