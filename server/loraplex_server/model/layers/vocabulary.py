"""The vocabulary layers: the input embedding and the output head."""

from __future__ import annotations

import dataclasses

import torch

from loraplex_kernels.pool import LoraSite


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The embedding and the head of a model.

    Attributes:
        embedding: as a site of one-hot tokens, [tokens] to [hidden].
        head: [hidden] to [tokens].
        table: [tokens, hidden], the embedding's.
        head_table: [tokens, hidden]; the same tensor if the two are tied.
        head_bias: [tokens], None where there is none.
        scale: factor of the embedding's rows.
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
        """Number of tokens of the base."""
        return self.table.shape[0]
