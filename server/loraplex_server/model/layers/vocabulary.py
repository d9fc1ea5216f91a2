"""The vocabulary layers: input embedding and output head."""

from __future__ import annotations

import dataclasses

import torch

from loraplex_kernels.pool import LoraSite


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The vocabulary layers of a model.

    Attributes:
        embedding: the embedding as a site, a projection of one-hot tokens: [tokens] to [hidden].
        embedding_path: its module path.
        head: the head as a site: [hidden] to [tokens].
        head_path: its module path.
        head_bias: [tokens]; None if the head has no bias.
        table: [tokens, hidden], of the embedding.
        head_table: [tokens, hidden]; the same tensor as `table` if the two are tied.
        scale: the factor by which the embedding multiplies its rows.
    """

    embedding: LoraSite
    embedding_path: str
    head: LoraSite
    head_path: str
    head_bias: torch.Tensor | None
    table: torch.Tensor
    head_table: torch.Tensor
    scale: float = 1.0

    @property
    def size(self) -> int:
        """Number of tokens of the base model."""
        return self.table.shape[0]
