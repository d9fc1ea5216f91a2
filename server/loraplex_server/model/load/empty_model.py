"""The base model before its weights are read."""

from __future__ import annotations

import dataclasses
import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from loraplex_kernels import dispatch
from loraplex_kernels.pool import LoraSite
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.fusion import fuse
from loraplex_server.model.layers.linear import FrozenHead
from loraplex_server.model.layers.norm import attach
from loraplex_server.model.layers.residual import ResidualStream
from loraplex_server.model.layers.vocabulary import Vocabulary
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.load import architecture
from loraplex_server.model.load.filler import Filler, TensorSource
from loraplex_server.model.parts import EmbeddingAndHead, Norm, Projection

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class EmptyModel:
    """A base model before its weights are read: their size is known, but no memory is taken for them.

    Attributes:
        model: the transformers model, its parameters on the meta device.
        grouped: the projections in layer order; siblings with the same input are held as one group.
        norms: the norms over the hidden size.
        kv_shapes: (KV heads, head dimension) of each layer.
        residual: maps the path of the projection that ends a sub-block to that of the norm that begins it.
        parameters: number of parameters of the unquantised model.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    format: WeightFormat
    grouped: tuple[tuple[Projection, ...], ...]
    norms: tuple[Norm, ...]
    embedding_and_head: EmbeddingAndHead
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
            FailedPreconditionError: the model cannot be served; the text says why.
        """
        architecture.check(config)
        try:
            model = architecture.build_empty(config, weight_format.dtype)
        except (ValueError, KeyError) as error:
            raise FailedPreconditionError(
                f"the architecture {config.model_type!r} cannot be served: transformers cannot build it with "
                f"another attention function ({error})"
            ) from error
        return cls(
            model=model,
            config=config,
            format=weight_format,
            grouped=tuple(architecture.find_groups(model)),
            norms=tuple(architecture.find_norms(model)),
            embedding_and_head=architecture.find_embedding_and_head(model),
            kv_shapes=tuple(architecture.kv_shapes(model)),
            residual=architecture.residual_norms(model),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            eos_token_ids=eos_token_ids,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights and the model's buffers will take.

        Raises:
            FailedPreconditionError: the format cannot hold a weight.
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
        """Reads and quantises the weights. This object must not be used afterwards.

        Args:
            source: the checkpoint.
            progress: draw a progress bar on stderr.
            fused: on devices with Triton kernels, fuse the operations between the projections.

        Raises:
            FailedPreconditionError: the weights are another model's, or the format cannot hold one of them.
        """
        model = self.model
        expected = set(model.state_dict())
        groups = Filler(model, list(self.grouped), self.format).fill(source, expected, progress)
        model.to(self.format.device)
        entries = sum(len(group) for group in self.grouped)
        norms = tuple(
            attach(model.get_submodule(norm.path), norm, entries + index)
            for index, norm in enumerate(self.norms)
        )
        vocabulary = attach_embedding_and_head(model, self.embedding_and_head, entries + len(norms))
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


def attach_embedding_and_head(
    model: PreTrainedModel, described: EmbeddingAndHead, first_entry: int
) -> Vocabulary:
    """The vocabulary layers of `model`; replaces its head by a `FrozenHead`.

    Args:
        first_entry: entry of the embedding in the adapter tables; the head's is the next.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    site = LoraSite(first_entry + 1, described.hidden_size, ((0, described.tokens),))
    model.set_output_embeddings(FrozenHead(head, site))
    table = embedding.weight
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return Vocabulary(
        embedding=LoraSite(first_entry, described.tokens, ((0, described.hidden_size),)),
        embedding_path=described.embedding_path,
        head=site,
        head_path=described.head_path,
        head_bias=head.bias,
        table=table,
        head_table=head.weight,
        # Rounded to the table's dtype, as the module does before it multiplies.
        scale=1.0 if scale is None else float(torch.as_tensor(scale).to("cpu", table.dtype)),
    )
