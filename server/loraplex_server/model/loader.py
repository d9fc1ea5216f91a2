"""Checkpoint to resident base model, tensor by tensor: the unquantised model never exists as a whole.

The transformers class is built with its parameters on the meta device, every decoder projection is
replaced by its stand-in, and tensors are read from the mapped safetensors files one after the other,
quantised on the way, so that memory peaks at the resident model plus a few tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loraplex_kernels import dispatch
from loraplex_kernels.pool import LoraSite
from loraplex_server.config import ModelConfig
from loraplex_server.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.model import architecture
from loraplex_server.model.architecture import Ends, Norm, Projection
from loraplex_server.model.checkpoint import Checkpoint, locate
from loraplex_server.model.fusion import fuse
from loraplex_server.model.linear import FrozenHead, SiteGroup, SiteLinear
from loraplex_server.model.norm import NormSite, attach
from loraplex_server.model.residual import ResidualStream
from loraplex_server.model.vocabulary import Vocabulary
from loraplex_server.model.weights import FrozenWeight, WeightFormat

_log = logging.getLogger(__name__)


class TensorSource(Protocol):
    """Where the tensors of a model come from, by their names in the checkpoint."""

    @property
    def names(self) -> set[str]: ...

    @property
    def total_bytes(self) -> int: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor; copy what is kept."""


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
        residual: what sub-blocks' outputs are added to, for the adapters that read it.
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
    residual: ResidualStream | None = None

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


@dataclasses.dataclass(frozen=True, eq=False)
class EmptyModel:
    """A base model before its weights are read: what they will take is known, nothing is taken.

    Attributes:
        model: its parameters are on the meta device.
        grouped: projections that will be held as one, siblings of one input together, in layer order.
        norms: over the hidden size.
        ends: embedding and head.
        residual: path of the projection that ends a sub-block, to that of the norm that begins it.
        parameters: of the unquantised model.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    format: WeightFormat
    grouped: tuple[tuple[Projection, ...], ...]
    norms: tuple[Norm, ...]
    ends: Ends
    kv_shapes: tuple[tuple[int, int], ...]
    residual: dict[str, str]
    parameters: int
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, config: PreTrainedConfig, weight_format: WeightFormat, eos_token_ids: tuple[int, ...] = ()
    ) -> EmptyModel:
        """The model of a transformers configuration.

        Raises:
            FailedPreconditionError: it cannot be served; the text says why.
        """
        architecture.check(config)
        try:
            model = architecture.build_empty(config, weight_format.dtype)
        except (ValueError, KeyError) as error:
            raise FailedPreconditionError(
                f"the architecture {config.model_type!r} cannot be served: transformers builds no model of "
                f"it with another attention function ({error})"
            ) from error
        return cls(
            model=model,
            config=config,
            format=weight_format,
            grouped=tuple(architecture.find_groups(model)),
            norms=tuple(architecture.find_norms(model)),
            ends=architecture.find_ends(model),
            kv_shapes=tuple(architecture.kv_shapes(model)),
            residual=architecture.residual_norms(model),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            eos_token_ids=eos_token_ids,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights, and the model's own tables, will take.

        Raises:
            FailedPreconditionError: a weight cannot be held in the format.
        """
        dtype = self.format.dtype
        in_groups = {p.path for group in self.grouped for p in group}
        head = self.model.get_output_embeddings()
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        total: int = sum(buffer.nbytes for buffer in self.model.buffers())
        for path, module in self.model.named_modules():
            if path not in in_groups:
                own = {id(p): p for p in module.parameters(recurse=False)}.values()
                shared = module.weight if tied and module is head else None
                total += sum(p.numel() for p in own if p is not shared) * dtype.itemsize
        for group in self.grouped:
            try:
                total += self.format.planned_bytes([(p.out_features, p.in_features) for p in group])
            except ValueError as error:
                raise FailedPreconditionError(f"{group[0].path}.weight: {error}") from error
            if any(p.has_bias for p in group):
                total += sum(p.out_features for p in group) * dtype.itemsize
        return total

    def _residual_norms(self) -> dict[int, str]:
        paths = [projection.path for group in self.grouped for projection in group]
        return {entry: self.residual[path] for entry, path in enumerate(paths) if path in self.residual}

    def fill(self, source: TensorSource, *, progress: bool = True, fused: bool = True) -> BaseModel:
        """Reads and quantises the weights; this object is used up.

        Args:
            fused: where Triton's kernels run, fuse what lies between the projections.

        Raises:
            FailedPreconditionError: they are not this model's, or cannot be held in the format.
        """
        model = self.model
        expected = set(model.state_dict())
        groups = _Filler(model, list(self.grouped), self.format).fill(source, expected, progress)
        model.to(self.format.device)
        entries = sum(len(group) for group in self.grouped)
        norms = tuple(
            attach(model.get_submodule(norm.path), norm, entries + index)
            for index, norm in enumerate(self.norms)
        )
        vocabulary = attach_ends(model, self.ends, entries + len(norms))
        if fused and dispatch.backend(self.format.device) == "triton":
            _log.info("fused: %s", fuse(model))
        return BaseModel(
            model=model,
            config=self.config,
            format=self.format,
            groups=tuple(groups),
            projections=tuple(projection for group in self.grouped for projection in group),
            norms=norms,
            vocabulary=vocabulary,
            kv_shapes=self.kv_shapes,
            residual=ResidualStream(model, self._residual_norms()),
            eos_token_ids=self.eos_token_ids,
            parameters=self.parameters,
        )


def prepare(config: ModelConfig) -> tuple[EmptyModel, Checkpoint]:
    """The base model that `config` names, without weights, and the files that have them.

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
    checkpoint = Checkpoint(folder)
    return EmptyModel.of(hf_config, weight_format, _eos_token_ids(folder, hf_config)), checkpoint


def load(config: ModelConfig, *, progress: bool = True) -> BaseModel:
    """Loads the base model that `config` names.

    Args:
        progress: draw a progress bar on stderr.

    Raises:
        NotFoundError: there is no such model.
        FailedPreconditionError: it cannot be served; the text says why.
    """
    empty, checkpoint = prepare(config)
    return empty.fill(checkpoint, progress=progress)


def attach_ends(model: PreTrainedModel, ends: Ends, first_entry: int) -> Vocabulary:
    """The embedding and the head, which is replaced by its stand-in."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    site = LoraSite(first_entry + 1, ends.hidden_size, ((0, ends.tokens),))
    model.set_output_embeddings(FrozenHead(head, site))
    table = embedding.weight
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return Vocabulary(
        embedding=LoraSite(first_entry, ends.tokens, ((0, ends.hidden_size),)),
        embedding_path=ends.embedding_path,
        head=site,
        head_path=ends.head_path,
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

    def fill(self, checkpoint: TensorSource, expected: set[str], progress: bool) -> list[SiteGroup]:
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
        self._done[index] = install(self._model, group, self._first_entry[index], weights, bias)


def install(
    model: PreTrainedModel,
    group: tuple[Projection, ...],
    first_entry: int,
    weights: list[FrozenWeight],
    bias: torch.Tensor | None,
) -> SiteGroup:
    """Puts frozen weights in the place of a group's projections; their entries begin at `first_entry`."""
    slices = []
    column = 0
    for projection in group:
        slices.append((column, projection.out_features))
        column += projection.out_features
    site = LoraSite(first_entry, group[0].in_features, tuple(slices))
    found = SiteGroup(tuple(p.path for p in group), site, weights, bias)
    for position, projection in enumerate(group):
        parent, _, leaf = projection.path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, SiteLinear(found, position))
    return found


def _eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    ids = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
