"""The modules of a model at which adapters act."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Projection:
    """One `nn.Linear` of the decoder; `path` is its module path in the transformers model."""

    path: str
    in_features: int
    out_features: int
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class Norm:
    """One norm over the hidden size; `path` is its module path."""

    path: str
    width: int
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class EmbeddingAndHead:
    """The input embedding and the output head, by module path. `tied`: both share one table."""

    embedding_path: str
    head_path: str
    tokens: int
    hidden_size: int
    head_has_bias: bool
    tied: bool


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """One norm over the hidden size, at which adapters may act.

    Attributes:
        entry: its row in the adapter tables.
        width: the hidden size.
        plain: the norm without adapters; it shares the model's parameters.
    """

    entry: int
    width: int
    plain: torch.nn.Module

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The norm of rows x [n, width] with this weight [width] and bias [width] in place of its own."""
        parameters = {"weight": weight, **({} if bias is None else {"bias": bias})}
        found: torch.Tensor = torch.func.functional_call(self.plain, parameters, (x,))
        return found
