"""A random Llama of about 100 million parameters with random adapters, for measuring speed at a real shape.

Made from a seed in a folder of the caller's choice; nothing is downloaded. Needs transformers and peft.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex_bench.peers.jobs import BenchModel

RANKS = (8, 16)
"""Ranks of the adapters, in turn."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Wider than the usual 0.02: the top two logits then lie clearly apart, and greedy tokens can be compared.
_INITIALIZER_RANGE = 0.05


def make_random_llama(folder: Path, *, adapters: int = 16, seed: int = 0, small: bool = False) -> BenchModel:
    """Writes `base/` and `adapters/<name>/` under `folder`.

    Args:
        adapters: how many; each adapts all seven linear layers, with A and B random and none of them zero.
        small: two layers of a quarter of the width instead, for trying the bench out.
    """
    torch.manual_seed(seed)
    shrink = 4 if small else 1
    config = LlamaConfig(
        vocab_size=32000 // shrink,
        hidden_size=768 // shrink,
        intermediate_size=2048 // shrink,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=12 // shrink,
        num_key_value_heads=4 // shrink,
        max_position_embeddings=2048,
        initializer_range=_INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).float()
    base = folder / "base"
    model.save_pretrained(base)
    word_tokenizer(config.vocab_size).save_pretrained(base)
    names = tuple(f"random-{index:02}" for index in range(adapters))
    for index, name in enumerate(names):
        rank = RANKS[index % len(RANKS)]
        settings = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, settings, adapter_name=name)
        adapted.save_pretrained(folder / "adapters", selected_adapters=[name])
        model = adapted.unload()
    label = f"random Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M"
    return BenchModel(label, base, folder / "adapters", names, config.vocab_size)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words t2 .. t(size-1), parted by spaces: enough for a server, which wants to give text as well."""
    vocabulary = {"<s>": 0, "</s>": 1} | {f"t{index}": index for index in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="</s>"
    )
