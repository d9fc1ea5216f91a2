"""Reads PEFT's `adapter_config.json`, and refuses every setting that would not be applied.

Patterns mean what they mean to PEFT:

- `rank_pattern` and `alpha_pattern`: the first key, in the file's order, that matches the module path as a
  regular expression, either whole or from a "." on;
- `target_modules` and `exclude_modules`: a string is a regular expression for the whole path (or
  "all-linear"), a list names whole paths or their endings from a "." on;
- `layers_to_transform` counts only where `target_modules` is a list and the module is not named whole;
- `modules_to_save`, and the keys of `trainable_token_indices`, name the endings of paths, from any letter on.

Configurations come from outside, so matching has a time limit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import regex

from loraplex_server.adapters.files.tensor_file import MalformedFileError, parse_object
from loraplex_server.core.text import quoted

MAX_PATTERN_CHARS = 4096
MATCH_SECONDS = 1.0
"""Time that all patterns of one adapter may take."""

_QUICK_SECONDS = 0.02

_WITHOUT_REPEATS = re.compile(r"[\w.\\\[\]-]{0,4096}")
"""Patterns without repetition, choice or groups: they cannot take long, and `re` is faster than `regex`."""

_KINDS: dict[str, str] = {
    "MULTITASK_PROMPT_TUNING": "its prompt depends on a task id",
    "CPT": "CPT needs soft prompts of known tokens",
}

_SETTINGS: dict[str, str] = {
    "use_qalora": "QALoRA pools the inputs",
    "target_parameters": "target_parameters acts on stacked expert parameters",
    "layer_replication": "layer_replication changes the base model's layers",
    "megatron_config": "a megatron_config shards the layers",
    "fan_in_fan_out": "fan_in_fan_out is for weights stored transposed; this base model has none",
    "kasa_config": "KaSA changes the base model's weights",
    "velora_config": "VeLoRA stores further tensors",
    "monteclora_config": "MonteCLoRA stores further tensors",
    "arrow_config": "Arrow routes between adapters",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
}

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "eva_config",
        "inference_mode",
        "init_ia3_weights",
        "init_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "num_frozen_tokens",
        "peft_version",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_text",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""Settings of training, of saving, and of methods that `_SETTINGS` or `init_lora_weights` decide about."""

_READ = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "feedforward_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "lora_bias",
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "rank_pattern",
        "target_modules",
        "token_dim",
        "token_indices",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)

_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations under which B A begins at zero and the base weights stay what they were."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MAX_TOKEN = 1 << 24

_HEADS = frozenset({"lm_head", "embed_out", "output"})


class UnsupportedError(ValueError):
    """The configuration asks for something that is not served; the text names it and the remedy."""


class Patterns:
    """Matches regular expressions from outside within one time limit for all of them.

    Every method raises UnsupportedError for what is no regular expression, or takes too long.
    """

    def __init__(self) -> None:
        self._left_s = MATCH_SECONDS
        self._simple: dict[str, re.Pattern[str]] = {}
        self._others: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, path: str) -> bool:
        """Whether `pattern` matches the whole path."""
        return self._matches(pattern, pattern, path)

    def ends_with(self, pattern: str, path: str) -> bool:
        """Whether `pattern` matches the whole path or its end from a "." on."""
        return self._matches(pattern, rf"(.*\.)?({pattern})", path)

    def layer(self, pattern: str, path: str) -> int | None:
        """The number in the group `idx` of a match at the beginning of `path`."""
        match = self._search(pattern, path, "match")
        return None if match is None else int(match.group("idx"))

    def _matches(self, given: str, pattern: str, path: str) -> bool:
        if _WITHOUT_REPEATS.fullmatch(given) is None:
            return self._search(pattern, path, "fullmatch") is not None
        if pattern not in self._simple:
            try:
                self._simple[pattern] = re.compile(pattern)
            except re.error as error:
                raise UnsupportedError(f"{quoted(given)} is no regular expression") from error
        return self._simple[pattern].fullmatch(path) is not None

    def _search(self, pattern: str, path: str, how: Literal["match", "fullmatch"]) -> regex.Match[str] | None:
        search = getattr(self._compile(pattern), how)
        begin = time.monotonic()
        try:
            try:
                return search(path, timeout=_QUICK_SECONDS)
            except TimeoutError:
                # Once more without the interpreter's lock, so that the engine goes on meanwhile.
                return search(path, timeout=max(self._left_s, _QUICK_SECONDS), concurrent=True)
        except TimeoutError as error:
            raise UnsupportedError(f"the pattern {quoted(pattern)} takes too long to match") from error
        finally:
            self._left_s -= time.monotonic() - begin

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise UnsupportedError(f"pattern {quoted(pattern, 60)} has over {MAX_PATTERN_CHARS} characters")
        if pattern not in self._others:
            try:
                self._others[pattern] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, ValueError) as error:
                raise UnsupportedError(f"{quoted(pattern)} is no regular expression") from error
        return self._others[pattern]


@dataclass(frozen=True)
class Targets:
    """Which modules a configuration puts something on.

    Attributes:
        modules: a regular expression, a list, or None where the file leaves it to the tensors.
    """

    modules: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    patterns: Patterns

    def includes(self, path: str, *, linear: bool = True) -> bool:
        """Whether the module at `path` is one of them; `linear` as "all-linear" means it."""
        if self._excludes(path):
            return False
        target = self.modules
        if target is None:
            return True
        if isinstance(target, str):
            if target.lower() == "all-linear":
                return linear and path.rpartition(".")[2] not in _HEADS
            return self.patterns.fullmatch(target, path)
        if path in target:
            return True
        if not any(path.endswith(f".{name}") for name in target):
            return False
        return not self.layers or self._layer(path) in self.layers

    def _excludes(self, path: str) -> bool:
        excluded = self.excluded
        if isinstance(excluded, str):
            return bool(excluded) and self.patterns.fullmatch(excluded, path)
        return any(path == name or path.endswith(f".{name}") for name in excluded or ())

    def _layer(self, path: str) -> int | None:
        if not self.layers_pattern:
            return self.patterns.layer(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        patterns = (rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.layers_pattern)
        layers = (self.patterns.layer(pattern, path) for pattern in patterns)
        return next((layer for layer in layers if layer is not None), None)


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA configuration says about each module."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    invocation_tokens: tuple[int, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    patterns: Patterns

    def rank_of(self, path: str) -> int:
        return self.rank_pattern.get(self._key(self.rank_pattern, path), self.rank)

    def alpha_of(self, path: str) -> float:
        return self.alpha_pattern.get(self._key(self.alpha_pattern, path), self.alpha)

    def scale_of(self, path: str) -> float:
        """What the product B A is multiplied with at `path`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def _key(self, pattern: Mapping[str, object], path: str) -> str:
        return next((key for key in pattern if self.patterns.ends_with(key, path)), path)


@dataclass(frozen=True)
class Ia3Settings:
    """What an IA3 configuration says about each module."""

    feedforward_modules: str | tuple[str, ...] | None
    patterns: Patterns

    def is_feedforward(self, path: str) -> bool:
        """Whether the vector at `path` scales the input, as PEFT decides: here a list names bare endings."""
        modules = self.feedforward_modules
        if isinstance(modules, str):
            return self.patterns.fullmatch(modules, path)
        return any(path.endswith(name) for name in modules or ())


@dataclass(frozen=True)
class PromptSettings:
    """What a prompt-tuning or P-tuning configuration says: how many virtual tokens stand before a prompt."""

    num_virtual_tokens: int


@dataclass(frozen=True)
class PrefixSettings:
    """What a prefix-tuning configuration says: virtual tokens, and the cache that they were made for.

    Attributes:
        num_layers, num_heads, width: layers, KV heads, and KV heads times head_dim; None where PEFT takes it
            from the model.
    """

    num_virtual_tokens: int
    num_layers: int | None
    num_heads: int | None
    width: int | None


@dataclass(frozen=True)
class NormSettings:
    """LN_TUNING: norms of the adapter's own."""


@dataclass(frozen=True)
class TokenSettings:
    """TRAINABLE_TOKENS: rows of the embedding."""


Method = LoraSettings | Ia3Settings | PromptSettings | PrefixSettings | NormSettings | TokenSettings


@dataclass(frozen=True)
class Replaced:
    """What a configuration takes from the base and has of its own, whatever its method.

    Attributes:
        modules: `modules_to_save`.
        tokens: ids of trainable tokens by the ending of a path; "" is the embedding.
        tied: what is done to the embedding is done to a head that is tied to it.
    """

    modules: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tied: bool = False

    def saves(self, path: str) -> bool:
        """Whether the module at `path`, or one that holds it, is to be saved whole."""
        parts = path.split(".")
        holders = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(holder.endswith(name) for holder in holders for name in self.modules)

    def tokens_at(self, path: str, *, embedding: bool) -> tuple[int, ...] | None:
        """The trainable tokens at a path, None where it is not named."""
        if embedding and "" in self.tokens:
            return self.tokens[""]
        return next((ids for name, ids in self.tokens.items() if name and path.endswith(name)), None)


@dataclass(frozen=True)
class AdapterSettings:
    """A configuration that will be applied whole.

    Attributes:
        peft_type: PEFT's name of the method, "LORA", "IA3", "PROMPT_TUNING" …
        canonical: the whole configuration as sorted compact JSON, part of the adapter's identity.
    """

    peft_type: str
    targets: Targets
    method: Method
    replaced: Replaced
    canonical: str


def parse_config(text: bytes) -> AdapterSettings:
    """The settings of an adapter.

    Raises:
        MalformedFileError: the text is no JSON object, or a setting has a wrong type.
        UnsupportedError: it is valid, but not all of it would be applied.
    """
    config = parse_object(text, "the configuration")
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise MalformedFileError("peft_type is missing; is this a configuration that PEFT saved?")
    methods: dict[str, Callable[[Mapping[str, Any], Patterns], Method]] = {
        "LORA": _lora,
        "IA3": _ia3,
        "PROMPT_TUNING": _prompt,
        "P_TUNING": _prompt,
        "PREFIX_TUNING": _prefix,
        "CARTRIDGE": _prefix,
        "LN_TUNING": lambda config, patterns: NormSettings(),
        "TRAINABLE_TOKENS": lambda config, patterns: TokenSettings(),
    }
    if peft_type not in methods:
        reason = _KINDS.get(peft_type, f"only {', '.join(methods)} are")
        raise UnsupportedError(f"peft_type {quoted(peft_type)} is not served: {reason}")
    for key, value in config.items():
        _check_setting(key, value)
    patterns = Patterns()
    targets = Targets(
        modules=_modules(config, "target_modules"),
        excluded=_modules(config, "exclude_modules"),
        layers=_layers(config),
        layers_pattern=_names(config, "layers_pattern"),
        patterns=patterns,
    )
    if isinstance(targets.modules, str) and (targets.layers or targets.layers_pattern):
        raise UnsupportedError("layers_to_transform and layers_pattern need target_modules to be a list")
    if targets.layers_pattern and not targets.layers:
        raise UnsupportedError("layers_pattern needs layers_to_transform")
    method = methods[peft_type](config, patterns)
    return AdapterSettings(
        peft_type=peft_type,
        targets=targets,
        method=method,
        replaced=_replaced(config, method),
        canonical=json.dumps(config, sort_keys=True, separators=(",", ":")),
    )


def _lora(config: Mapping[str, Any], patterns: Patterns) -> LoraSettings:
    settings = LoraSettings(
        rank=_rank("r", config.get("r", 8)),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_flag(config, "use_rslora"),
        use_dora=_flag(config, "use_dora"),
        lora_bias=_flag(config, "lora_bias"),
        invocation_tokens=_ids(config, "alora_invocation_tokens"),
        rank_pattern={key: _rank("rank_pattern", value) for key, value in _mapping(config, "rank_pattern")},
        alpha_pattern={
            key: _number("alpha_pattern", value) for key, value in _mapping(config, "alpha_pattern")
        },
        patterns=patterns,
    )
    if settings.use_dora and settings.lora_bias:
        raise UnsupportedError("lora_bias with use_dora is not served: PEFT defines no result for both")
    return settings


def _ia3(config: Mapping[str, Any], patterns: Patterns) -> Ia3Settings:
    return Ia3Settings(_modules(config, "feedforward_modules"), patterns)


def _replaced(config: Mapping[str, Any], method: Method) -> Replaced:
    for key, kind in (("token_indices", TokenSettings), ("trainable_token_indices", LoraSettings)):
        if config.get(key) and not isinstance(method, kind):
            raise UnsupportedError(f"{key} is no setting of {config['peft_type']}")
    modules = _names(config, "modules_to_save")
    if "" in modules:
        raise UnsupportedError("modules_to_save has an empty name")
    trainable = config.get("trainable_token_indices")
    tokens: dict[str, tuple[int, ...]] = {}
    if isinstance(method, TokenSettings):
        tokens[""] = _ids(config, "token_indices")
    elif isinstance(trainable, dict) and "" not in trainable:
        tokens = {name: _token_ids("trainable_token_indices", ids) for name, ids in trainable.items()}
    elif trainable is not None:
        tokens[""] = _ids(config, "trainable_token_indices")
    for ids in tokens.values():
        if len(set(ids)) < len(ids) or any(token > _MAX_TOKEN for token in ids):
            raise UnsupportedError("trainable tokens name an id twice, or one that no vocabulary has")
    tokens = {name: ids for name, ids in tokens.items() if ids}
    if (modules or tokens) and isinstance(method, PromptSettings):
        raise UnsupportedError("modules_to_save, trainable_token_indices beside a soft prompt are not served")
    if (modules or tokens) and isinstance(method, LoraSettings) and method.invocation_tokens:
        raise UnsupportedError(
            "modules_to_save and trainable_token_indices beside alora_invocation_tokens are not served: they "
            "would change what comes before the invocation"
        )
    return Replaced(modules, tokens, _flag(config, "ensure_weight_tying"))


def _prompt(config: Mapping[str, Any], patterns: Patterns) -> PromptSettings:
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UnsupportedError("num_transformer_submodules is not 1: only decoders are served")
    return PromptSettings(_rank("num_virtual_tokens", config.get("num_virtual_tokens")))


def _prefix(config: Mapping[str, Any], patterns: Patterns) -> PrefixSettings:
    prompt = _prompt(config, patterns)

    def size(key: str) -> int | None:
        return None if config.get(key) is None else _rank(key, config[key])

    return PrefixSettings(
        prompt.num_virtual_tokens, size("num_layers"), size("num_attention_heads"), size("token_dim")
    )


def _check_setting(key: str, value: object) -> None:
    unset = value is None or value is False or value == "" or value == [] or value == {}
    if key == "bias":
        if value not in (None, "none"):
            raise UnsupportedError(f"bias {quoted(value)} is not served: the base's biases stay as they are")
    elif key == "init_lora_weights":
        _check_init(value)
    elif key in _SETTINGS:
        if not unset:
            raise UnsupportedError(f"{key} is not served: {_SETTINGS[key]}")
    elif key not in _READ and key not in _WITHOUT_EFFECT and not unset:
        raise UnsupportedError(
            f"the setting {quoted(key)} is not known here, so it cannot be applied; "
            "remove it if it has no effect"
        )


def _check_init(value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name in _HARMLESS_INITS:
        return
    if name.startswith(_BASE_CHANGING_INITS):
        raise UnsupportedError(
            f"init_lora_weights {quoted(value)} changed the base model's weights in training, so the adapter "
            "does not fit the base as it was; save it with path_initial_model_for_weight_conversion"
        )
    raise UnsupportedError(
        f"init_lora_weights {quoted(value)} is not known, so it may have changed the base model"
    )


def _rank(key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise MalformedFileError(f"{key} has {quoted(value)}, which is no usable number")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is no number")
    # Compared first: an integer of any length can be, and only then is it sure to be a float.
    if not abs(value) <= 1e9:
        raise MalformedFileError(f"{key} has {quoted(value)}, which is no usable scale")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is neither true nor false")
    return bool(value)


def _mapping(config: Mapping[str, Any], key: str) -> list[tuple[str, object]]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is no mapping")
    return list(value.items())


def _modules(config: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    return _names(config, key)


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is no list of names")
    return tuple(value)


def _layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    items = value if isinstance(value, list) else [value]
    if value is None or items == []:
        return None
    if any(type(item) is not int for item in items):
        raise MalformedFileError(f"layers_to_transform has {quoted(value)}, which is no list of layers")
    return tuple(items)


def _ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    return _token_ids(key, config.get(key))


def _token_ids(key: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise MalformedFileError(f"{key} has {quoted(value)}, which is no list of token ids")
    return tuple(value)
