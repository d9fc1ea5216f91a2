"""Where token ids go in and come out: the embedding and the head."""

from __future__ import annotations

import dataclasses

import torch

from loraplex_kernels.pool import LoraSite


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The two ends of a model.

    Attributes:
        embedding: as a site of one-hot tokens, [tokens] to [hidden].
        head: [hidden] to [tokens].
        table: [tokens, hidden], of the embedding.
        head_table: [tokens, hidden]; the same tensor where the two are tied.
        head_bias: [tokens], None where there is none.
        scale: what the embedding multiplies its rows with.
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
        """Tokens of the base."""
        return self.table.shape[0]
