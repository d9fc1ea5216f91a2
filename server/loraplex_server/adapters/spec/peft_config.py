"""Reads PEFT's `adapter_config.json`, and refuses every setting that would not be applied.

Which settings those are is in `kinds`, what patterns mean in `patterns`. `modules_to_save`, and the keys of
`trainable_token_indices`, name the endings of paths, from any letter on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loraplex_server.adapters.spec import fields
from loraplex_server.adapters.spec.fields import parse_object
from loraplex_server.adapters.spec.kinds import PEFT_SETTINGS, PEFT_TYPES, Treatment, is_unset
from loraplex_server.adapters.spec.patterns import Patterns, Targets
from loraplex_server.adapters.spec.refusals import MalformedFileError, UnsupportedError
from loraplex_server.core.text import quoted

_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations under which B A begins at zero and the base weights stay what they were."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MAX_TOKEN = 1 << 24
"""Larger than any vocabulary: the largest have about 2**18 tokens."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a LoRA configuration, by module."""

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
        """The factor of the product B A at `path`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def _key(self, pattern: Mapping[str, object], path: str) -> str:
        return next((key for key in pattern if self.patterns.ends_with(key, path)), path)


@dataclass(frozen=True)
class Ia3Settings:
    """Settings of an IA3 configuration, by module."""

    feedforward_modules: str | tuple[str, ...] | None
    patterns: Patterns

    def is_feedforward(self, path: str) -> bool:
        """True if the vector at `path` scales the input, as PEFT decides: here a list names bare endings."""
        modules = self.feedforward_modules
        if isinstance(modules, str):
            return self.patterns.fullmatch(modules, path)
        return any(path.endswith(name) for name in modules or ())


@dataclass(frozen=True)
class PromptSettings:
    """Settings of prompt tuning and P-tuning: the number of virtual tokens before a prompt."""

    num_virtual_tokens: int


@dataclass(frozen=True)
class PrefixSettings:
    """Settings of prefix tuning: virtual tokens, and the cache that they were made for.

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
    """Weights of the base that an adapter replaces by its own, whatever its method.

    Attributes:
        modules: `modules_to_save`.
        tokens: ids of trainable tokens by the ending of a path; "" is the embedding.
        tied: what is done to the embedding is done to a head that is tied to it.
    """

    modules: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tied: bool = False

    def saves(self, path: str) -> bool:
        """True if the module at `path`, or one that holds it, is to be saved whole."""
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
    if peft_type not in _METHODS:
        known = PEFT_TYPES.get(peft_type)
        reason = known.note if known is not None else f"only {', '.join(_METHODS)} are"
        raise UnsupportedError(f"peft_type {quoted(peft_type)} is not served: {reason}")
    for key, value in config.items():
        _check_setting(key, value)
    patterns = Patterns()
    targets = Targets(
        modules=fields.modules(config, "target_modules"),
        excluded=fields.modules(config, "exclude_modules"),
        layers=fields.layers(config),
        layers_pattern=fields.names(config, "layers_pattern"),
        patterns=patterns,
    )
    if isinstance(targets.modules, str) and (targets.layers or targets.layers_pattern):
        raise UnsupportedError("layers_to_transform and layers_pattern need target_modules to be a list")
    if targets.layers_pattern and not targets.layers:
        raise UnsupportedError("layers_pattern needs layers_to_transform")
    method = _METHODS[peft_type](config, patterns)
    return AdapterSettings(
        peft_type=peft_type,
        targets=targets,
        method=method,
        replaced=_replaced(config, method),
        canonical=json.dumps(config, sort_keys=True, separators=(",", ":")),
    )


def _lora(config: Mapping[str, Any], patterns: Patterns) -> LoraSettings:
    settings = LoraSettings(
        rank=fields.size("r", config.get("r", 8)),
        alpha=fields.number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=fields.flag(config, "use_rslora"),
        use_dora=fields.flag(config, "use_dora"),
        lora_bias=fields.flag(config, "lora_bias"),
        invocation_tokens=fields.ids(config, "alora_invocation_tokens"),
        rank_pattern={
            key: fields.size("rank_pattern", value) for key, value in fields.mapping(config, "rank_pattern")
        },
        alpha_pattern={
            key: fields.number("alpha_pattern", value)
            for key, value in fields.mapping(config, "alpha_pattern")
        },
        patterns=patterns,
    )
    if settings.use_dora and settings.lora_bias:
        raise UnsupportedError("lora_bias with use_dora is not served: PEFT defines no result for both")
    return settings


def _ia3(config: Mapping[str, Any], patterns: Patterns) -> Ia3Settings:
    return Ia3Settings(fields.modules(config, "feedforward_modules"), patterns)


def _replaced(config: Mapping[str, Any], method: Method) -> Replaced:
    for key, kind in (("token_indices", TokenSettings), ("trainable_token_indices", LoraSettings)):
        if config.get(key) and not isinstance(method, kind):
            raise UnsupportedError(f"{key} is not a setting of {config['peft_type']}")
    modules = fields.names(config, "modules_to_save")
    if "" in modules:
        raise UnsupportedError("modules_to_save has an empty name")
    trainable = config.get("trainable_token_indices")
    tokens: dict[str, tuple[int, ...]] = {}
    if isinstance(method, TokenSettings):
        tokens[""] = fields.ids(config, "token_indices")
    elif isinstance(trainable, dict) and "" not in trainable:
        tokens = {name: fields.token_ids("trainable_token_indices", ids) for name, ids in trainable.items()}
    elif trainable is not None:
        tokens[""] = fields.ids(config, "trainable_token_indices")
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
    return Replaced(modules, tokens, fields.flag(config, "ensure_weight_tying"))


def _prompt(config: Mapping[str, Any], patterns: Patterns) -> PromptSettings:
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UnsupportedError("num_transformer_submodules is not 1: only decoders are served")
    return PromptSettings(fields.size("num_virtual_tokens", config.get("num_virtual_tokens")))


def _prefix(config: Mapping[str, Any], patterns: Patterns) -> PrefixSettings:
    prompt = _prompt(config, patterns)

    def size(key: str) -> int | None:
        return None if config.get(key) is None else fields.size(key, config[key])

    return PrefixSettings(
        prompt.num_virtual_tokens, size("num_layers"), size("num_attention_heads"), size("token_dim")
    )


_METHODS: dict[str, Callable[[Mapping[str, Any], Patterns], Method]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "PROMPT_TUNING": _prompt,
    "P_TUNING": _prompt,
    "PREFIX_TUNING": _prefix,
    "CARTRIDGE": _prefix,
    "LN_TUNING": lambda config, patterns: NormSettings(),
    "TRAINABLE_TOKENS": lambda config, patterns: TokenSettings(),
}


def _check_setting(key: str, value: object) -> None:
    setting = PEFT_SETTINGS.get(key)
    if key == "bias":
        if value not in (None, "none"):
            raise UnsupportedError(f"bias {quoted(value)} is not served: the base's biases stay as they are")
    elif key == "init_lora_weights":
        _check_init(value)
    elif is_unset(value):
        return
    elif setting is None:
        raise UnsupportedError(
            f"the setting {quoted(key)} is not known here, so it cannot be applied; "
            "remove it if it has no effect"
        )
    elif setting.treatment is Treatment.REFUSED:
        raise UnsupportedError(f"{key} is not served: {setting.note}")


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
