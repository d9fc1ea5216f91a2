"""Which checkpoints can be served, and the empty model they are loaded into."""

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
    """Refuses what is known not to work, before anything is built.

    Raises:
        FailedPreconditionError: saying why this checkpoint cannot be served.
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
    """Most tokens of one request: `asked`, or the model's own limit where `asked` is 0.

    Rope kinds whose frequencies depend on the longest position of the whole batch ("longrope",
    "dynamic") are served up to the length below which they do not: beyond it one request's answer
    would depend on another's length.

    Raises:
        FailedPreconditionError: `asked` lies beyond what can be served exactly.
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
    """The transformers model with its parameters on the meta device and its buffers (rope) real."""
    attention.register()
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model.requires_grad_(False)
    _settle_rope(model)
    return model.eval()


def _settle_rope(model: PreTrainedModel) -> None:
    """Keeps position embeddings as they were built.

    Kinds that depend on the longest position read it back from the device in every step; within
    `longest_context` they would find nothing to change.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")


def find_groups(model: PreTrainedModel) -> list[tuple[Projection, ...]]:
    """Every projection of the decoder's layers, siblings of one input together, in layer order.

    Raises:
        FailedPreconditionError: a layer holds weights that are no projection (stacked experts, say).
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
                f"{name} is no nn.Linear; mixtures of experts and convolutions are not served",
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
    """Every norm over the hidden size, with its path: a module of a weight, perhaps a bias, as long as it.

    Norms of single heads see their rows in an order that differs from family to family, and are left out.
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
        FailedPreconditionError: the head is something else than a linear module with a row for each token.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tokens, hidden = embedding.weight.shape
    if not isinstance(head, torch.nn.Linear) or head.weight.shape != embedding.weight.shape:
        raise _refusal(
            model.config.model_type,
            f"its head is no nn.Linear of {hidden} inputs and {tokens} outputs, as its embedding has",
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
    """For attention's and the MLP's last projection in each layer, the norm that sees the residual stream.

    Where a layer does not norm the input of both sub-blocks, under the names that most families use, it has
    none of either.
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
            # With a norm at the end of the MLP, this one is at the end of the attention.
            before_mlp = after if f"{layer}.post_feedforward_layernorm" not in paths else ""
        ends = (f"{layer}.self_attn.o_proj", path), (f"{layer}.mlp.down_proj", before_mlp)
        if all(end in paths and norm in paths for end, norm in ends):
            found.update(ends)
    return found


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(KV heads, head dimension) of each layer, as its attention module has them.

    Raises:
        FailedPreconditionError: a layer has none, so that its cache cannot be laid out.
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
    """Parameters registered inside go to the meta device; buffers, which no checkpoint holds, are made."""
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
