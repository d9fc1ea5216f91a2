"""The frozen base model, ready to run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from loraplex_server.model.layers.linear import SiteGroup
from loraplex_server.model.layers.residual import ResidualStream
from loraplex_server.model.layers.vocabulary import Vocabulary
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.parts import NormSite, Projection


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """The frozen base, ready to run.

    Attributes:
        model: the transformers model; call it only inside a `context.running` block.
        groups: its projections, siblings of one input together. Rows ("entries") of the adapter tables are
            numbered in the order of groups and of projections in a group.
        projections: the projection of each of these entries.
        norms: its norms over the hidden size; their entries follow those of the projections.
        vocabulary: embedding and head; their entries are the last two.
        kv_shapes: (KV heads, head dimension) of each layer.
        parameters: number of parameters of the unquantised model.
        residual: the residual stream, for adapters that read it.
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
        """Every resident weight by name; tied tensors appear once."""
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
        """Computes SHA-256 over names and bytes of all resident weights.

        It yields before each tensor, so that the caller can do other work, and returns the hex digest.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            yield
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        return digest.hexdigest()
