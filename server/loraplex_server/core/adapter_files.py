"""Names of the files that an adapter's folder may hold."""

from __future__ import annotations

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Names that the `adapters` library uses. Its configuration file has the same name as PEFT's.
BOTTLENECK_FILE = "adapter.safetensors"
INTERFACE_FILE = "adapter_interface.json"
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")

MAX_CONFIG_BYTES = 1 << 20
"""Larger configuration files are refused; PEFT writes a few KB."""

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TEXT_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, CHAT_TEMPLATE_FILE)
"""Files of an adapter's own tokenizer and chat template; all are optional."""

MAX_EXTRA_FILE_BYTES = 32 << 20
"""Size limit of each of the `TEXT_FILES`; the tokenizer of a large vocabulary needs about this much."""

PICKLE_FILES = {
    "adapter_model.bin": "save_pretrained with safe_serialization=True",
    "pytorch_adapter.bin": "save_adapter with use_safetensors=True",
}
"""Pickled weights, which are never read, and the call that saves the adapter as safetensors instead."""
