"""Loads a checkpoint's tensors into a model and quantises each group of projections when it is complete."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Protocol

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from loraplex_kernels.pool import LoraSite
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.layers.linear import SiteGroup, SiteLinear
from loraplex_server.model.layers.weights import FrozenWeight, WeightFormat
from loraplex_server.model.parts import Projection


class TensorSource(Protocol):
    """A source of a model's tensors, by their names in the checkpoint."""

    @property
    def names(self) -> set[str]: ...

    @property
    def total_bytes(self) -> int: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name; copy a tensor to keep it."""


class Filler:
    """Puts a checkpoint's tensors into a model; quantises a group when all its tensors have been read."""

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
                f"the checkpoint holds {len(unknown)} tensors that {type(self._model).__name__} does not "
                f"have, among them {unknown[0]}"
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
        """The model's name for a checkpoint's tensor; older checkpoints of some families use other names."""
        if name in expected:
            return name
        for renaming in self._renamings:
            for source, target in zip(renaming.source_patterns, renaming.target_patterns, strict=False):
                renamed = re.sub(source, target, name)
                if renamed in expected:
                    return renamed
        return name

    def _ignorable(self, name: str) -> bool:
        # Old checkpoints hold buffers that the model computes itself: rope's frequencies, attention masks.
        return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        index = self._group_of.get(path)
        wanted = getattr(module, leaf)
        if wanted.shape != tensor.shape:
            raise FailedPreconditionError(
                f"{name} is {list(tensor.shape)} in the checkpoint, but {list(wanted.shape)} by config.json"
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
    """Replaces the projections of a group by `SiteLinear` modules over its frozen weights.

    Args:
        first_entry: entry of the first projection in the adapter tables.
        weights: frozen weights; concatenated along `out` they give the packed output.
        bias: [out] of the packed output, or None.
    """
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
