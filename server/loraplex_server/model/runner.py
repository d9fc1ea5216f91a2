"""A step plan in, one sampled token for each finished row out."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch

from loraplex_kernels import parallel, vectors
from loraplex_kernels.attention import AttentionBatch, LayerShape
from loraplex_kernels.lora import LoraBatchBuffers, LoraPool
from loraplex_server.core.step import StepOutput, StepPlan
from loraplex_server.model import context
from loraplex_server.model.context import StepContext
from loraplex_server.model.effects import Effect, effects_of
from loraplex_server.model.loader import BaseModel
from loraplex_server.model.prefix import place_prefixes
from loraplex_server.model.sampler import sample


class ModelRunner:
    """Runs the base model with the adapters of a pool over one paged KV cache."""

    def __init__(
        self,
        base: BaseModel,
        kv_caches: tuple[torch.Tensor, ...],
        pool: LoraPool,
        *,
        block_size: int,
        max_batch_tokens: int,
        max_pairs_per_token: int,
        layers: Iterable[LayerShape] = (),
    ) -> None:
        """`layers`: shapes of the attention, as the self-check saw them; their tables travel together."""
        self._base = base
        self._kv_caches = kv_caches
        self._pool = pool
        self._block_size = block_size
        self._layers = tuple(dict.fromkeys(layers))
        self._device = base.format.device
        self._embed = base.model.get_input_embeddings()
        # An elementwise op on the widest activation: four times the hidden size, eight bytes a nanosecond.
        self._token_us = 4 * self._embed.weight.shape[-1] * 4 / 8_000
        self._segments = LoraBatchBuffers(
            max_tokens=max_batch_tokens,
            max_pairs=max_batch_tokens * max_pairs_per_token,
            device=self._device,
        )

    def run(self, plan: StepPlan) -> StepOutput:
        """Computes every token of the plan, writes its keys and values, and samples."""
        if not len(plan.sample_row):
            self.logits(plan)
            return StepOutput(())
        return StepOutput(sample(self.logits(plan), plan))

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Next-token logits [S, vocabulary] of the plan's `sample_row`."""
        place_prefixes(plan, self._pool, self._kv_caches)
        step = StepContext(
            attention=AttentionBatch.build(
                plan.query_start,
                plan.context_len,
                plan.block_start,
                plan.blocks,
                plan.slot_mapping,
                block_size=self._block_size,
                device=self._device,
                layers=self._layers,
            ),
            kv_caches=self._kv_caches,
            effects=self._effects(plan),
            attended=int(np.diff(plan.query_start) @ plan.context_len),
        )
        with context.running(step), parallel.threads_for(plan.num_tokens * self._token_us):
            output = self._base.model(
                inputs_embeds=self._embeddings(plan).unsqueeze(0),
                position_ids=self._tensor(plan.positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self._tensor(plan.sample_row),
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def weight_checksum(self) -> Generator[None, None, str]:
        """SHA-256 over the resident base weights, in pieces: yields between them, returns it at the end."""
        return self._base.checksum_steps()

    def _embeddings(self, plan: StepPlan) -> torch.Tensor:
        """[T, hidden]; a negative token id is a row of a soft prompt."""
        ids = plan.token_ids
        if not (ids < 0).any():
            found: torch.Tensor = self._embed(self._tensor(ids))
            return found
        found = self._embed(self._tensor(np.maximum(ids, 0)))
        vectors.place_soft_prompts(found, torch.from_numpy(ids), self._pool, self._segments.fill(plan.runs))
        return found

    def _effects(self, plan: StepPlan) -> tuple[Effect, ...]:
        """What adapters do in this step; nothing is launched for a step without adapters."""
        if not len(plan.run_start):
            return ()
        return effects_of(self._pool, self._segments.fill(plan.runs))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
