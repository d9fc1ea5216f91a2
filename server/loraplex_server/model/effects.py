"""What adapters do to the projections of a step. The runner and the linears know only `Effect`."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from loraplex_kernels import lora
from loraplex_kernels.lora import LoraBatch, LoraPool, LoraSite


class Effect(Protocol):
    """One kind of adapter, for all tokens of a step that use it; tokens that do not stay as they are.

    A site's input passes `before` of every effect in order, then the frozen weight, then `after` of
    every effect in order.
    """

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        """The input [T, in] that the frozen weight sees; `x` itself must stay as it is."""

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        """Changes the output [T, out] in place; `x` is what the frozen weight saw."""


@dataclasses.dataclass(frozen=True)
class LowRankAdd:
    """LoRA: y += weight * (x A^T) B, for each of a token's adapters (Hu et al., 2021)."""

    pool: LoraPool
    batch: LoraBatch

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return x

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        lora.apply(x, y, self.pool, site, self.batch)
