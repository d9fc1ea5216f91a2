"""A step plan in, one sampled token for each finished row out."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch

from loraplex_kernels import parallel, vectors, vocabulary
from loraplex_kernels.attention import AttentionBatch, LayerShape
from loraplex_kernels.lora import LoraBatch, LoraBatchBuffers, LoraPool
from loraplex_server.core.step import StepOutput, StepPlan
from loraplex_server.model import context
from loraplex_server.model.context import StepContext
from loraplex_server.model.effects import effects_of, embedding_effects, head_effects, norm_effects
from loraplex_server.model.loader import BaseModel
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
        max_samples: int = 0,
        layers: Iterable[LayerShape] = (),
    ) -> None:
        """`max_samples`: most rows sampled in a step, 0 for all of its tokens. `layers`: shapes of the
        attention, as the self-check saw them; their tables travel together.
        """
        self._base = base
        self._kv_caches = kv_caches
        self._pool = pool
        self._block_size = block_size
        self._layers = tuple(dict.fromkeys(layers))
        self._device = base.format.device
        self._embed = base.model.get_input_embeddings()
        # An elementwise op on the widest activation: four times the hidden size, eight bytes a nanosecond.
        self._token_us = 4 * self._embed.weight.shape[-1] * 4 / 8_000
        self._segments, self._sampled_segments = (
            LoraBatchBuffers(max_tokens=tokens, max_pairs=tokens * max_pairs_per_token, device=self._device)
            for tokens in (max_batch_tokens, max_samples or max_batch_tokens)
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
        batch = self._segments.fill(plan.runs) if len(plan.run_start) else None
        sampled = None if batch is None else self._sampled(plan, batch)
        added = np.zeros(0, np.int64) if sampled is None else self._added_tokens(plan, sampled)
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
            attended=int(np.diff(plan.query_start) @ plan.context_len),
            # Nothing is launched for a step without adapters.
            effects=() if batch is None else effects_of(self._pool, batch),
            norms=() if batch is None else norm_effects(self._pool, batch),
            head=() if sampled is None else head_effects(self._pool, sampled, self._base.vocabulary),
            added_tokens=int(added.max(initial=0)),
        )
        with context.running(step), parallel.threads_for(plan.num_tokens * self._token_us):
            output = self._base.model(
                inputs_embeds=self._embeddings(plan, batch).unsqueeze(0),
                position_ids=self._tensor(plan.positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self._tensor(plan.sample_row),
            )
        logits: torch.Tensor = output.logits[0]
        if step.added_tokens:
            columns = torch.arange(step.added_tokens, device=self._device)
            absent = columns >= self._tensor(added)[:, None]
            logits[:, self._base.vocabulary.size :].masked_fill_(absent, -torch.inf)
        return logits

    def weight_checksum(self) -> Generator[None, None, str]:
        """SHA-256 over the resident base weights, in pieces: yields between them, returns it at the end."""
        return self._base.checksum_steps()

    def _embeddings(self, plan: StepPlan, batch: LoraBatch | None) -> torch.Tensor:
        """[T, hidden]; a negative token id is a row of a soft prompt, one past the base's an adapter's."""
        ids, site = plan.token_ids, self._base.vocabulary
        own = (ids < 0) | (ids >= site.size)
        found: torch.Tensor = self._embed(self._tensor(np.where(own, 0, ids) if own.any() else ids))
        if batch is None:
            return found
        for effect in embedding_effects(self._pool, batch, site):
            effect.embed(site, ids, found)
        if (ids < 0).any():
            vectors.place_soft_prompts(found, torch.from_numpy(ids), self._pool, batch)
        return found

    def _sampled(self, plan: StepPlan, batch: LoraBatch) -> LoraBatch | None:
        """The batch of the sampled rows alone, None where no adapter does anything at the head."""
        if not vocabulary.acts_at(self._pool, batch, self._base.vocabulary.head.first_entry):
            return None
        runs = plan.runs
        owner = np.searchsorted(plan.run_start, plan.sample_row, "right") - 1
        inside = (owner >= 0) & (plan.sample_row < plan.run_end[owner])
        found = [
            (row, row + 1, runs[run][2])
            for row, (run, has) in enumerate(zip(owner.tolist(), inside.tolist(), strict=True))
            if has
        ]
        return self._sampled_segments.fill(found) if found else None

    def _added_tokens(self, plan: StepPlan, sampled: LoraBatch) -> np.ndarray:
        """[S]: how many tokens each sampled row's adapter adds to the vocabulary."""
        site, added = self._base.vocabulary, np.zeros(len(plan.sample_row), np.int64)
        found = vocabulary.added_tokens(self._pool, sampled, site.head.first_entry, site.size)
        added[: len(found)] = found
        return added

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)
