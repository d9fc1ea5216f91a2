"""A Llama of any size with random weights and adapters, made on the device at hand: nothing is downloaded.

`RandomWeights` feeds the loader directly; `write` makes the folders that a server, or transformers with PEFT,
is started on. Weights are normal and never zero: zeros would hide what is not read, and run faster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from loraplex_bench.models.random_llama import TARGETS, word_tokenizer
from loraplex_bench.peers.jobs import BenchModel

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}

_DEVIATION = 0.02
_SHARD_BYTES = 4 << 30


def config_of(shape: str) -> LlamaConfig:
    """The transformers configuration of one of `SHAPES`."""
    return LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)


class RandomWeights:
    """The tensors of a model, drawn one after the other on `device`; a seed gives the same tensors there."""

    def __init__(
        self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._dtype, self._device, self._seed = dtype, device, seed

    @property
    def names(self) -> set[str]:
        return set(self._shapes)

    @property
    def total_bytes(self) -> int:
        total: int = sum(shape.numel() for shape in self._shapes.values()) * self._dtype.itemsize
        return total

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Norms are one; all else is normal."""
        generator = torch.Generator(self._device).manual_seed(self._seed)
        for name, shape in self._shapes.items():
            tensor = torch.ones(shape, dtype=self._dtype, device=self._device)
            if len(shape) > 1:
                tensor.normal_(std=_DEVIATION, generator=generator)
            yield name, tensor


def write(
    folder: Path,
    shape: str,
    adapters: int,
    *,
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device,
) -> BenchModel:
    """Writes `base/` and `adapters/<name>/` under `folder`: adapters of all seven projections, none of them
    without effect."""
    config = config_of(shape)
    weights = RandomWeights(config, dtype, device)
    base = folder / "base"
    base.mkdir(parents=True)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    word_tokenizer(config.vocab_size).save_pretrained(base)
    _write_shards(base, weights)
    names = tuple(f"random-{index:03}" for index in range(adapters))
    for index, name in enumerate(names):
        _write_adapter(folder / "adapters" / name, config, rank, dtype, device, index)
    parameters = weights.total_bytes / dtype.itemsize
    return BenchModel(
        f"random {shape}, {parameters / 1e6:,.0f} M", base, folder / "adapters", names, config.vocab_size
    )


def _write_shards(folder: Path, weights: RandomWeights) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if held:
            shards.append(list(held))
            save_file(held, folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
            held.clear()

    for name, tensor in weights.tensors():
        if sum(each.nbytes for each in held.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        held[name] = tensor.cpu()
    flush()
    index = {
        name: f"model-{number:05}.safetensors" for number, names in enumerate(shards, 1) for name in names
    }
    document = {"metadata": {"total_size": weights.total_bytes}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def _write_adapter(
    folder: Path, config: LlamaConfig, rank: int, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(1000 + seed)
    hidden, inner = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_value),
        "self_attn.v_proj": (hidden, key_value),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for path, (width_in, width_out) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            for part, size in (("lora_A", (rank, width_in)), ("lora_B", (width_out, rank))):
                tensor = torch.empty(size, dtype=dtype, device=device)
                tensors[f"{prefix}.{part}.weight"] = tensor.normal_(std=_DEVIATION, generator=generator)
    folder.mkdir(parents=True)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), task_type="CAUSAL_LM").save_pretrained(
        folder
    )
