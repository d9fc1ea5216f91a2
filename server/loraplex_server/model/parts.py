"""The parts of a model that adapters act at, as the checkpoint names them."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Projection:
    """One `nn.Linear` of the decoder, as the checkpoint names it."""

    path: str
    in_features: int
    out_features: int
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class Norm:
    """One norm over the hidden size."""

    path: str
    width: int
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class EmbeddingAndHead:
    """The input embedding and the output head. `tied`: both share one table."""

    embedding_path: str
    head_path: str
    tokens: int
    hidden_size: int
    head_has_bias: bool
    tied: bool


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """One norm over the hidden size.

    Attributes:
        entry: its row in the adapter tables.
        plain: the norm itself, untouched; its parameters are shared with the model's.
    """

    entry: int
    width: int
    plain: torch.nn.Module

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The norm of rows x [n, width] with the given parameters, each [width]."""
        parameters = {"weight": weight, **({} if bias is None else {"bias": bias})}
        found: torch.Tensor = torch.func.functional_call(self.plain, parameters, (x,))
        return found
