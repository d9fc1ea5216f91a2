"""The checks that an architecture can be served, and the empty model that its weights are loaded into."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.layers import attention
from loraplex_server.model.parts import EmbeddingAndHead, Norm, Projection

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check(config: PreTrainedConfig) -> None:
    """Refuses architectures that are known not to work, before anything is built.

    Raises:
        FailedPreconditionError: this checkpoint cannot be served; the text says why.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(kind, "it is an encoder-decoder; only decoders are served")
    if (
        getattr(config, "vision_config", None) is not None
        or getattr(config, "audio_config", None) is not None
    ):
        raise _refusal(kind, "it is multimodal; serve its text model alone")
    if getattr(config, "quantization_config", None) is not None:
        raise _refusal(kind, "its weights are quantised already; give the unquantised checkpoint")
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise _refusal(kind, f"it has layers of type {', '.join(sorted(unknown))}")


def longest_context(config: PreTrainedConfig, asked: int) -> int:
    """Most tokens of one request: `asked`, or the model's own limit if `asked` is 0.

    The frequencies of some rope kinds ("longrope", "dynamic") depend on the longest position in the batch
    once it exceeds a certain length. There, one request's answer would depend on another's length, so such
    models are served only up to that length.

    Raises:
        FailedPreconditionError: `asked` is more than can be served exactly.
    """
    own: int = getattr(config, "max_position_embeddings", None) or asked or 4096
    limit, reason = own, "the model's max_position_embeddings"
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = int(
                rope.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or own
            )
            # "dynamic" grows beyond max_position_embeddings, "longrope" switches at the original length.
            steady = original if rope["rope_type"] == "longrope" else min(own, original)
            if steady < limit:
                limit = steady
                reason = f"where its {rope['rope_type']} position embedding begins to depend on the batch"
    if asked > limit:
        raise FailedPreconditionError(f"--max-model-len {asked} is more than {limit}, {reason}")
    return asked or limit


def build_empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model: parameters on the meta device, buffers (rope) with their values."""
    attention.register()
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model.requires_grad_(False)
    _settle_rope(model)
    return model.eval()


def _settle_rope(model: PreTrainedModel) -> None:
    """Keeps the rope frequencies as they were built.

    Kinds that depend on the longest position read it back from the device in every step. Up to
    `longest_context` they never change anything, so this only costs time.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")


def find_groups(model: PreTrainedModel) -> list[tuple[Projection, ...]]:
    """Every projection of the decoder's layers, in layer order, siblings with the same input in one group.

    Raises:
        FailedPreconditionError: a layer has weights that do not belong to an `nn.Linear`, for example stacked
            experts; or no layer has an `nn.Linear`.
    """
    head = model.get_output_embeddings()
    found: dict[str, Projection] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and _LAYER.search(path):
            found[path] = Projection(path, module.in_features, module.out_features, module.bias is not None)
    if not found:
        raise _refusal(model.config.model_type, "no nn.Linear was found in its layers")
    known = {f"{path}.weight" for path in found}
    for name, parameter in model.named_parameters():
        if _LAYER.search(name) and parameter.ndim > 1 and name not in known:
            raise _refusal(
                model.config.model_type,
                f"{name} is not an nn.Linear; mixtures of experts and convolutions are not served",
            )
    groups: list[tuple[Projection, ...]] = []
    taken: set[str] = set()
    for path, projection in found.items():
        if path in taken:
            continue
        parent, _, leaf = path.rpartition(".")
        group: tuple[Projection, ...] = (projection,)
        for names in _SIBLINGS:
            siblings = [found.get(f"{parent}.{name}") for name in names]
            if leaf in names and all(
                s is not None and s.in_features == projection.in_features for s in siblings
            ):
                group = tuple(s for s in siblings if s is not None)
        taken.update(member.path for member in group)
        groups.append(group)
    return groups


def find_norms(model: PreTrainedModel) -> list[Norm]:
    """Every norm over the hidden size: a module with only a weight, and perhaps a bias, of that length.

    Norms of single heads are left out: the order of their rows differs between model families.
    """
    hidden = model.get_input_embeddings().weight.shape[1]
    found = []
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters())
        shapes = {tuple(parameter.shape) for parameter in parameters.values()}
        if "weight" in parameters and parameters.keys() <= {"weight", "bias"} and shapes == {(hidden,)}:
            found.append(Norm(path, hidden, "bias" in parameters))
    return found


def find_embedding_and_head(model: PreTrainedModel) -> EmbeddingAndHead:
    """The embedding and the head.

    Raises:
        FailedPreconditionError: the head is not an `nn.Linear` with one output per token.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tokens, hidden = embedding.weight.shape
    if not isinstance(head, torch.nn.Linear) or head.weight.shape != embedding.weight.shape:
        raise _refusal(
            model.config.model_type,
            f"its head is not an nn.Linear of {hidden} inputs and {tokens} outputs, like its embedding",
        )
    paths = {module: path for path, module in model.named_modules()}
    return EmbeddingAndHead(
        embedding_path=paths[embedding],
        head_path=paths[head],
        tokens=tokens,
        hidden_size=hidden,
        head_has_bias=head.bias is not None,
        tied=bool(getattr(model.config, "tie_word_embeddings", False)),
    )


def residual_norms(model: PreTrainedModel) -> dict[str, str]:
    """Maps the last projection of each attention and MLP to the norm of the residual stream before it.

    Keys and values are module paths. A layer is left out unless it norms the input of both sub-blocks and
    uses the names that most model families use.
    """
    found: dict[str, str] = {}
    paths = {path for path, _ in model.named_modules()}
    for path in paths:
        layer, _, leaf = path.rpartition(".")
        if leaf != "input_layernorm" or _LAYER.search(path) is None:
            continue
        after = f"{layer}.post_attention_layernorm"
        before_mlp = f"{layer}.pre_feedforward_layernorm"
        if before_mlp not in paths:
            # If there is a norm after the MLP, `after` norms the attention's output, not the MLP's input.
            before_mlp = after if f"{layer}.post_feedforward_layernorm" not in paths else ""
        ends = (f"{layer}.self_attn.o_proj", path), (f"{layer}.mlp.down_proj", before_mlp)
        if all(end in paths and norm in paths for end, norm in ends):
            found.update(ends)
    return found


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(KV heads, head dimension) of each layer, read from its attention module.

    Raises:
        FailedPreconditionError: a layer has no attention module, so its cache cannot be laid out.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes: dict[int, tuple[int, int]] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and (hasattr(module, "scaling") or hasattr(module, "num_key_value_groups")):
            shapes[layer] = (heads, getattr(module, "head_dim", None) or width)
    if sorted(shapes) != list(range(config.num_hidden_layers)):
        raise _refusal(config.model_type, "not every layer has an attention module with a layer index")
    return [shapes[layer] for layer in range(config.num_hidden_layers)]


def _rope_parameters(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _refusal(kind: str, reason: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"the architecture {kind!r} cannot be served: {reason}")


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Puts parameters that are registered inside on the meta device.

    Buffers keep their values, because checkpoints do not hold them.
    """
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
