"""Checkpoint to resident base model, tensor by tensor: the unquantised model never exists as a whole.

The transformers class is built with its parameters on the meta device, every decoder projection is
replaced by its stand-in, and tensors are read from the mapped safetensors files one after the other,
quantised on the way, so that memory peaks at the resident model plus a few tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Generator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loraplex_kernels.lora import LoraSite
from loraplex_server.config import ModelConfig
from loraplex_server.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.model import architecture
from loraplex_server.model.architecture import Projection
from loraplex_server.model.checkpoint import Checkpoint, locate
from loraplex_server.model.linear import FrozenHead, SiteGroup, SiteLinear
from loraplex_server.model.norm import NormSite, attach
from loraplex_server.model.vocabulary import Vocabulary
from loraplex_server.model.weights import WeightFormat

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """The frozen base, ready to run.

    Attributes:
        model: the transformers model; call it inside a `context.running` block only.
        groups: its projections; entries of the adapter tables are numbered in this order.
        projections: (path, in, out) of each entry.
        norms: its norms, whose entries follow.
        vocabulary: embedding and head, whose entries are the last two.
        kv_shapes: (KV heads, head dimension) of each layer.
        parameters: of the unquantised model.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    format: WeightFormat
    groups: tuple[SiteGroup, ...]
    projections: tuple[Projection, ...]
    norms: tuple[NormSite, ...]
    vocabulary: Vocabulary
    kv_shapes: tuple[tuple[int, int], ...]
    eos_token_ids: tuple[int, ...]
    parameters: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every resident weight by name; tied tensors once."""
        found = dict(self.model.named_parameters())
        for group in self.groups:
            for index, weight in enumerate(group.weights):
                found |= {f"{group.paths[0]}.{index}.{name}": t for name, t in weight.tensors().items()}
            if group.bias is not None:
                found[f"{group.paths[0]}.bias"] = group.bias
        return found

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def checksum_steps(self) -> Generator[None, None, str]:
        """SHA-256 over names and bytes of all resident weights, in pieces: yields between tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            yield
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        return digest.hexdigest()


def resolve_device(device: str) -> torch.device:
    """The device that "auto" means here.

    Raises:
        InvalidArgumentError: CUDA was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError.field("device", "torch finds no CUDA device; use --device cpu")
    return torch.device(device)


def resolve_format(config: ModelConfig, device: torch.device) -> WeightFormat:
    """The weight format, "auto" dtype resolved: float32 on a CPU, bfloat16 on a GPU that has it.

    On a CPU, packed int4 multiplies in bf16: it is taken where the dtype is left open or is bf16, and left
    alone where more was asked for.
    """
    dtype = config.dtype
    if dtype == "auto" and device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    packed = config.quantization == "int4" and device.type == "cpu" and dtype in ("auto", "bfloat16")
    return WeightFormat(
        quantization=config.quantization,
        dtype=_DTYPES["float32" if dtype == "auto" else dtype],
        device=device,
        double_quant=config.double_quant,
        packed_int4=packed,
    )


def load(config: ModelConfig, *, progress: bool = True) -> BaseModel:
    """Loads the base model that `config` names.

    Args:
        progress: draw a progress bar on stderr.

    Raises:
        NotFoundError: there is no such model.
        FailedPreconditionError: it cannot be served; the text says why.
    """
    folder = locate(config.model)
    device = resolve_device(config.device)
    weight_format = resolve_format(config, device)
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise FailedPreconditionError(f"the model's config.json cannot be used: {error}") from error
    architecture.check(hf_config)
    checkpoint = Checkpoint(folder)
    try:
        model = architecture.build_empty(hf_config, weight_format.dtype)
    except (ValueError, KeyError) as error:
        raise FailedPreconditionError(
            f"the architecture {hf_config.model_type!r} cannot be served: transformers builds no model of it "
            f"with another attention function ({error})"
        ) from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    grouped = architecture.find_groups(model)
    kv_shapes = tuple(architecture.kv_shapes(model))
    expected = set(model.state_dict())
    groups = _Filler(model, grouped, weight_format).fill(checkpoint, expected, progress)
    model.to(device)
    entries = sum(len(group) for group in grouped)
    norms = [
        attach(norm, path, entries + index)
        for index, (path, norm) in enumerate(architecture.find_norms(model))
    ]
    vocabulary = _vocabulary(model, entries + len(norms))
    return BaseModel(
        model=model,
        config=hf_config,
        format=weight_format,
        groups=tuple(groups),
        projections=tuple(projection for group in grouped for projection in group),
        norms=tuple(norms),
        vocabulary=vocabulary,
        kv_shapes=kv_shapes,
        eos_token_ids=_eos_token_ids(folder, hf_config),
        parameters=parameters,
    )


def _vocabulary(model: PreTrainedModel, first_entry: int) -> Vocabulary:
    """The embedding and the head; a linear head is replaced by its stand-in.

    Raises:
        FailedPreconditionError: the head is something else, or has other rows than the embedding.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = embedding.weight
    tokens, hidden = table.shape
    if not isinstance(head, torch.nn.Linear) or head.weight.shape != table.shape:
        raise FailedPreconditionError(
            f"the architecture {model.config.model_type!r} cannot be served: its head is no nn.Linear of "
            f"{hidden} inputs and {tokens} outputs, as its embedding has"
        )
    scale = getattr(embedding, "embed_scale", None)
    head_path = architecture.path_of(model, head)
    site = LoraSite(first_entry + 1, hidden, ((0, tokens),))
    model.set_output_embeddings(FrozenHead(head, site))
    return Vocabulary(
        embedding=LoraSite(first_entry, tokens, ((0, hidden),)),
        embedding_path=architecture.path_of(model, embedding),
        head=site,
        head_path=head_path,
        head_bias=head.bias,
        table=table,
        head_table=head.weight,
        # As the module multiplies: rounded to the activations' type.
        scale=1.0 if scale is None else float(torch.as_tensor(scale).to("cpu", table.dtype)),
    )


class _Filler:
    """Puts a checkpoint's tensors where they belong, freezing a group once all its siblings are there."""

    def __init__(
        self, model: PreTrainedModel, grouped: list[tuple[Projection, ...]], weight_format: WeightFormat
    ) -> None:
        self._model = model
        self._format = weight_format
        self._grouped = grouped
        self._group_of = {p.path: index for index, group in enumerate(grouped) for p in group}
        self._pending: dict[int, dict[str, torch.Tensor]] = {}
        self._done: dict[int, SiteGroup] = {}
        self._renamings = [
            step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)
        ]
        first_entries = [0]
        for group in grouped:
            first_entries.append(first_entries[-1] + len(group))
        self._first_entry = first_entries

    def fill(self, checkpoint: Checkpoint, expected: set[str], progress: bool) -> list[SiteGroup]:
        tied = set(getattr(self._model, "_tied_weights_keys", None) or ())
        head_is_tied = bool(getattr(self._model.config, "tie_word_embeddings", False))
        target = {name: self._target(name, expected) for name in checkpoint.names}
        names = set(target.values()) & expected
        optional = tied if head_is_tied else set()
        if missing := sorted(expected - names - optional):
            raise FailedPreconditionError(
                f"the checkpoint lacks {len(missing)} tensors of {type(self._model).__name__}, "
                f"among them {missing[0]}; is it the right model?"
            )
        if unknown := sorted(
            name for name in checkpoint.names if target[name] not in expected and not self._ignorable(name)
        ):
            raise FailedPreconditionError(
                f"the checkpoint holds {len(unknown)} tensors that {type(self._model).__name__} has no place "
                f"for, among them {unknown[0]}"
            )
        bar = tqdm(
            total=checkpoint.total_bytes,
            desc=f"loading base model ({self._format.quantization})",
            unit="B",
            unit_scale=True,
            disable=not progress,
            file=sys.stderr,
            mininterval=0.5,
        )
        with bar:
            for name, tensor in checkpoint.tensors():
                if target[name] in expected and not (head_is_tied and target[name] in tied):
                    self._place(target[name], tensor)
                bar.update(tensor.nbytes)
        if head_is_tied:
            self._model.tie_weights()
        return [self._done[index] for index in range(len(self._grouped))]

    def _target(self, name: str, expected: set[str]) -> str:
        """The model's name for a checkpoint's tensor: older checkpoints of some families use others."""
        if name in expected:
            return name
        for renaming in self._renamings:
            for source, target in zip(renaming.source_patterns, renaming.target_patterns, strict=False):
                renamed = re.sub(source, target, name)
                if renamed in expected:
                    return renamed
        return name

    def _ignorable(self, name: str) -> bool:
        # Old checkpoints hold rope's frequencies, which are computed.
        return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        index = self._group_of.get(path)
        wanted = getattr(module, leaf)
        if wanted.shape != tensor.shape:
            raise FailedPreconditionError(
                f"{name} is {list(tensor.shape)} in the checkpoint and {list(wanted.shape)} by config.json"
            )
        if index is None:
            value = tensor.to(self._format.device, self._format.dtype, copy=True)
            if leaf in module._parameters:
                module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
            return
        pending = self._pending.setdefault(index, {})
        pending[name] = tensor
        group = self._grouped[index]
        if len(pending) == sum(1 + projection.has_bias for projection in group):
            self._freeze(index, self._pending.pop(index))

    def _freeze(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        group = self._grouped[index]
        try:
            weights = self._format.freeze([tensors[f"{p.path}.weight"] for p in group])
        except ValueError as error:
            raise FailedPreconditionError(f"{group[0].path}.weight: {error}") from error
        bias: torch.Tensor | None = None
        if any(p.has_bias for p in group):
            bias = torch.cat(
                [
                    tensors[f"{p.path}.bias"].to(self._format.dtype)
                    if p.has_bias
                    else torch.zeros(p.out_features, dtype=self._format.dtype)
                    for p in group
                ]
            ).to(self._format.device)
        slices = []
        column = 0
        for projection in group:
            slices.append((column, projection.out_features))
            column += projection.out_features
        site = LoraSite(self._first_entry[index], group[0].in_features, tuple(slices))
        found = SiteGroup(tuple(p.path for p in group), site, weights, bias)
        for position, projection in enumerate(group):
            parent, _, leaf = projection.path.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, SiteLinear(found, position))
        self._done[index] = found


def _eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    ids = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
