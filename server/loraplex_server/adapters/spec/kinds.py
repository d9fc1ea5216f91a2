"""Tables of the kinds of adapters that are served, and of the settings of their configurations.

`docs/reference/adapter-kinds.md` is written from these tables (`reference`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple


class PeftType(NamedTuple):
    """One of PEFT's methods.

    Attributes:
        note: what is served of it, or why it is refused; "" where nothing more is to be said.
    """

    served: bool
    note: str = ""


PEFT_TYPES: Mapping[str, PeftType] = {
    "LORA": PeftType(
        True,
        "on the layers' projections, the embedding and the head; also DoRA, rsLoRA, `lora_bias`, activated "
        "LoRA (aLoRA), trained tokens and whole modules",
    ),
    "IA3": PeftType(True, "on projections; a feed-forward's vector needs an input that no projection shares"),
    "PROMPT_TUNING": PeftType(
        True, "for decoders; the prompt may not have trained tokens or whole modules beside it"
    ),
    "P_TUNING": PeftType(True, "as PROMPT_TUNING: PEFT saves the prompt, not the network that made it"),
    "PREFIX_TUNING": PeftType(True, "where all layers have caches of one shape; PEFT saves keys and values"),
    "CARTRIDGE": PeftType(True, "as PREFIX_TUNING"),
    "LN_TUNING": PeftType(True, "weights and biases of norms"),
    "TRAINABLE_TOKENS": PeftType(True, "rows of the embedding, and of a head that is tied to it"),
    "MULTITASK_PROMPT_TUNING": PeftType(False, "its prompt depends on a task id"),
    "CPT": PeftType(False, "CPT needs soft prompts of known tokens"),
}

OTHER_PEFT_TYPES = (
    "ADALORA",
    "ADAMSS",
    "ADAPTION_PROMPT",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "LILY",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "POLY",
    "PSOFT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHADOW",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
    "XLORA",
)
"""The other types of PEFT 0.21. They are refused as unknown names are: only those above are known."""


class Treatment(enum.Enum):
    """Ways to treat a setting."""

    APPLIED = "applied"
    REFUSED = "refused, unless it is unset"
    IGNORED = "without effect on what is served"


class Setting(NamedTuple):
    """A setting of a configuration.

    Attributes:
        note: for one that is applied, its meaning and conditions; for one that is refused, the reason.
    """

    treatment: Treatment
    note: str = ""


def is_unset(value: object) -> bool:
    """True for a value that means nothing: null, false, or empty."""
    return value is None or value is False or value == "" or value == [] or value == {}


def _applied(note: str) -> Setting:
    return Setting(Treatment.APPLIED, note)


def _refused(note: str) -> Setting:
    return Setting(Treatment.REFUSED, note)


def _ignored(*names: str) -> dict[str, Setting]:
    return dict.fromkeys(names, Setting(Treatment.IGNORED))


PEFT_SETTINGS: Mapping[str, Setting] = {
    "peft_type": _applied("the kind"),
    "r": _applied("rank of each module that `rank_pattern` does not name; 8 where it is left out"),
    "lora_alpha": _applied("scale times rank; 8 where it is left out"),
    "use_rslora": _applied("the scale is alpha over the root of the rank"),
    "rank_pattern": _applied("the first key that matches a module's path, or its end from a dot on"),
    "alpha_pattern": _applied("as `rank_pattern`"),
    "use_dora": _applied("not with `lora_bias`, nor on rows of the vocabulary that are not the base's"),
    "lora_bias": _applied("not with `use_dora`, nor on a head that has rows for added tokens"),
    "alora_invocation_tokens": _applied(
        "on the layers' projections; not with `modules_to_save` or `trainable_token_indices`"
    ),
    "target_modules": _applied(
        "a list, a regular expression, or `all-linear`; each module named must be in the file"
    ),
    "exclude_modules": _applied("a list or a regular expression"),
    "layers_to_transform": _applied("where `target_modules` is a list"),
    "layers_pattern": _applied("with `layers_to_transform`"),
    "feedforward_modules": _applied("of IA3: where the input is scaled"),
    "modules_to_save": _applied(
        "whole projections, norms, embedding and head; not beside a soft prompt or `alora_invocation_tokens`"
    ),
    "trainable_token_indices": _applied(
        "of LORA; not beside a soft prompt, `alora_invocation_tokens`, or a pair on the same weight"
    ),
    "token_indices": _applied("of TRAINABLE_TOKENS"),
    "ensure_weight_tying": _applied("what is done to the embedding is done to a head that is tied to it"),
    "num_virtual_tokens": _applied("of soft prompts and prefixes"),
    "num_layers": _applied("of prefixes: must be the base's"),
    "num_attention_heads": _applied("of prefixes: must be the base's KV heads"),
    "token_dim": _applied("of prefixes: must be the base's KV heads times their width"),
    "num_transformer_submodules": _applied("1 or unset"),
    "bias": _applied("`none` or unset: the base's biases stay as they are"),
    "init_lora_weights": _applied(
        "true, false, `gaussian`, `eva`, `orthogonal` or `mica`. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA "
        "change the base's weights in training and are refused; save those with "
        "`path_initial_model_for_weight_conversion`"
    ),
    "use_qalora": _refused("QALoRA pools the inputs"),
    "target_parameters": _refused("target_parameters acts on stacked expert parameters"),
    "layer_replication": _refused("layer_replication changes the base model's layers"),
    "megatron_config": _refused("a megatron_config shards the layers"),
    "fan_in_fan_out": _refused("fan_in_fan_out is for weights stored transposed; this base model has none"),
    "kasa_config": _refused("KaSA changes the base model's weights"),
    "velora_config": _refused("VeLoRA stores further tensors"),
    "monteclora_config": _refused("MonteCLoRA stores further tensors"),
    "arrow_config": _refused("Arrow routes between adapters"),
    "use_bdlora": _refused("BD-LoRA stores block-diagonal factors"),
    # Of training, of saving, and of methods that other settings decide about.
    **_ignored(
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
    ),
}
"""Settings of PEFT's `adapter_config.json`. One that is not here is refused, unless it is unset."""

BOTTLENECK_SETTINGS: Mapping[str, Setting] = {
    "architecture": _applied("unset: LoRA, IA3, prompts and prefixes are taken as PEFT saves them"),
    "mh_adapter": _applied("networks after attention"),
    "output_adapter": _applied("networks after the MLP"),
    "reduction_factor": _applied("one for all layers, or by layer with a default"),
    "non_linearity": _applied("the library's names; one that the server does not compute is refused by name"),
    "scaling": _applied("a number, `learned` or `channel`"),
    "leave_out": _applied("layers without networks; not all of them"),
    "is_parallel": _applied("the networks read the residual stream, which has to be known"),
    "original_ln_before": _applied("not for a base with a norm after attention or MLP"),
    "original_ln_after": _applied("true where the library hooks into the model"),
    "residual_before_ln": _applied("true or false; the residual has to be added once in all"),
    "ln_before": _refused("a layer norm of the adapter's own"),
    "ln_after": _refused("a layer norm of the adapter's own"),
    "use_gating": _refused("its gate looks at the whole sequence at once"),
    "phm_layer": _refused("hypercomplex layers (Compacter) store other tensors"),
    "inv_adapter": _refused("invertible adapters change the embeddings and the head"),
    "invertible_adapter": _refused("invertible adapters change the embeddings and the head"),
    **_ignored(
        # Within `ln_after`.
        "adapter_residual_before_ln",
        # Of encoder-decoders.
        "cross_adapter",
        # Of training.
        "dropout",
        "init_weights",
        "init_weights_seed",
        "stochastic_depth",
        # Within `inv_adapter` and `phm_layer`.
        "factorized_phm_W",
        "factorized_phm_rule",
        "hypercomplex_nonlinearity",
        "inv_adapter_reduction_factor",
        "learn_phm",
        "phm_bias",
        "phm_c_init",
        "phm_dim",
        "phm_init_range",
        "phm_rank",
        "shared_W_phm",
        "shared_phm_rule",
    ),
}
"""Settings of the `adapters` library's bottleneck configuration. One that is not here is refused likewise."""
