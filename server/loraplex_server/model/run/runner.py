"""The model runner: computes step plans and samples their tokens."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterable

import numpy as np
import torch

from loraplex_kernels import parallel, vectors
from loraplex_kernels import vocabulary as ends
from loraplex_kernels.attention import AttentionBatch, LayerShape
from loraplex_kernels.pool import LoraBatch, LoraBatchBuffers, LoraPool
from loraplex_server.core.step import Ints, StepOutput, StepPlan
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers import context
from loraplex_server.model.layers.context import StepContext
from loraplex_server.model.layers.effects import (
    acts_between,
    acts_outside,
    effects_of,
    embedding_effects,
    head_effects,
    norm_effects,
)
from loraplex_server.model.run import sampler, warmup
from loraplex_server.model.run import scoring as scoring_of
from loraplex_server.model.run.clock import DeviceClock, Span
from loraplex_server.model.run.graphs import DecodeGraphs, GraphLimits
from loraplex_server.model.run.prefix import place_prefixes
from loraplex_server.model.run.sampler import Sampling
from loraplex_server.model.run.scoring import Scoring
from loraplex_server.model.run.transfer import send

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LaunchTimes:
    """The host's seconds for preparing the inputs, for the forward pass and for the sampler."""

    prepare_s: float
    forward_s: float
    sample_s: float


class Pending:
    """A launched step, which the device may still be computing."""

    def __init__(
        self,
        sampling: Sampling | None,
        span: Span | None,
        times: LaunchTimes,
        scoring: Scoring | None = None,
    ) -> None:
        self._sampling = sampling
        self._scoring = scoring
        self._span = span
        self._times = times

    def result(self) -> StepOutput:
        """Waits for the step and returns its sampled and scored tokens, and its times."""
        started_s = time.perf_counter()
        sampled = () if self._sampling is None else self._sampling.result()
        scored = () if self._scoring is None else self._scoring.result()
        times, fetch_s = self._times, time.perf_counter() - started_s
        if self._span is None:
            inline = times.prepare_s, times.forward_s, times.sample_s + fetch_s
            return StepOutput(sampled, None, None, *inline, scored)
        device_s, waited_s = self._span.seconds()
        launching_s = times.prepare_s + times.forward_s + times.sample_s
        return StepOutput(sampled, device_s, waited_s, launching_s, device_s, fetch_s, scored)


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
        """Allocates the buffers for the adapters' segments.

        Args:
            kv_caches: one per layer, [num_blocks, 2, num_kv_heads, block_size, head_dim].
            block_size: tokens per KV block.
            max_batch_tokens: most tokens of a step.
            max_pairs_per_token: most adapters of one token.
            max_samples: most rows that a step samples or scores; 0 is `max_batch_tokens`.
            layers: the layers' attention shapes, from the self-check; their tables are sent in one copy.
        """
        self._base = base
        self._kv_caches = kv_caches
        self._pool = pool
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_pairs_per_token = max_pairs_per_token
        self._layers = tuple(dict.fromkeys(layers))
        self._device = base.format.device
        self._embed = base.model.get_input_embeddings()
        # Microseconds per token of an elementwise op on the widest activation: four times the hidden size, in
        # float32, at eight bytes per nanosecond.
        self._token_us = 4 * self._embed.weight.shape[-1] * 4 / 8_000
        self._segments, self._sampled_segments = (
            LoraBatchBuffers(max_tokens=tokens, max_pairs=tokens * max_pairs_per_token, device=self._device)
            for tokens in (max_batch_tokens, max_samples or max_batch_tokens)
        )
        self._clock = DeviceClock(self._device)
        self._graphs: DecodeGraphs | None = None
        # The tokens that the last launched step sampled, int64 [S] on the device.
        self._tokens: torch.Tensor | None = None

    @property
    def asynchronous(self) -> bool:
        """True if `launch` returns before the step is computed."""
        return self._device.type == "cuda"

    def warm_up(self, max_context: int) -> None:
        """Runs steps of every kind, so that no request waits for a kernel to be compiled or loaded.

        Call it before the first request: the steps write to block 0 of the KV cache.

        Args:
            max_context: tokens of the longest request.
        """
        started_s = time.monotonic()
        plans = list(
            warmup.plans(
                self._max_batch_tokens,
                max_context,
                self._pool.num_slots,
                self._max_pairs_per_token,
                self._block_size,
            )
        )
        for done, plan in enumerate(plans, 1):
            self.run(plan)
            if done == len(plans) or not done % 16:
                _log.info("warm-up: %d of %d steps, %.1f s", done, len(plans), time.monotonic() - started_s)

    def record_graphs(self, sizes: tuple[int, ...], max_context: int) -> None:
        """Records decode steps; later steps replay them.

        Args:
            sizes: numbers of tokens to record (`graphs.ladder`).
            max_context: tokens of the longest request.

        Raises:
            RuntimeError: the device cannot record; steps are launched kernel by kernel, as before.
            ValueError: the device uses the torch references.
        """
        limits = GraphLimits(
            sizes=sizes,
            block_size=self._block_size,
            num_blocks=self._kv_caches[0].shape[0],
            max_blocks_per_sequence=-(-max_context // self._block_size),
            max_pairs_per_token=self._max_pairs_per_token,
        )
        graphs = DecodeGraphs(self._decode, self._pool, self._layers, limits, self._device)
        graphs.record(self._kv_caches)
        self._graphs = graphs

    def run(self, plan: StepPlan) -> StepOutput:
        """Launches a step and waits for its result."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Computes every token of the plan, writes keys and values, samples and scores.

        On a GPU this only queues the work, in order, without waiting. On a CPU the work is done on return.
        """
        started_s = time.perf_counter()
        forward = self._prepare(plan)
        self._clock.begin()
        prepared_s = time.perf_counter()
        logits = forward()
        forwarded_s = time.perf_counter()
        count = len(plan.sample_row)
        sampling = sampler.launch(logits[:count], plan) if count else None
        scoring = scoring_of.launch(logits[count:], plan) if len(plan.score_row) else None
        self._tokens = None if sampling is None else sampling.tokens
        span, sampled_s = self._clock.end(), time.perf_counter()
        times = LaunchTimes(prepared_s - started_s, forwarded_s - prepared_s, sampled_s - forwarded_s)
        return Pending(sampling, span, times, scoring)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Next-token logits [S + Q, vocabulary] in the rows `plan.logit_row`; valid until the next step."""
        return self._prepare(plan)()

    def usable(self) -> bool:
        """True if the device still computes; the engine asks after a failed step.

        After an illegal memory access, for example, every call in the CUDA context fails.
        """
        if self._device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self._device)
            return int(torch.ones(1, device=self._device).sum()) == 1
        except RuntimeError:
            _log.exception("the device does not compute any more")
            return False

    def weight_checksum(self) -> Generator[None, None, str]:
        """Computes SHA-256 over the base weights; yields between pieces, returns the hex digest."""
        return self._base.checksum_steps()

    def _prepare(self, plan: StepPlan) -> Callable[[], torch.Tensor]:
        """Starts to copy a step's inputs to the device; returns a function that computes its logits."""
        place_prefixes(plan, self._pool, self._kv_caches)
        replay = None if self._graphs is None else self._graphs.prepare(plan, self._tokens)
        return self._eager(plan) if replay is None else replay

    def _eager(self, plan: StepPlan) -> Callable[[], torch.Tensor]:
        """`_prepare` for a step without a recording, launched kernel by kernel."""
        batch = self._segments.fill(plan.runs) if len(plan.run_start) else None
        # Most steps have no adapters, or only adapters at the layers' projections; others cost more.
        outside = batch if batch is not None and acts_outside(self._pool, batch) else None
        sampled = None if outside is None else self._sampled(plan, outside)
        added = self._added_tokens(plan, sampled)
        vocabulary, ids = self._base.vocabulary, np.maximum(plan.token_ids, 0)
        if outside is not None and (ids >= vocabulary.size).any():
            ends.check_ids(ids, self._pool, vocabulary.embedding, outside)
        token_ids, positions, rows, fed_row, fed_from, added_to = send(
            [ids, plan.positions, plan.logit_row, plan.fed_row, plan.fed_from, added], self._device
        )
        if len(plan.fed_row):
            assert self._tokens is not None
            token_ids.index_copy_(0, fed_row, self._tokens.index_select(0, fed_from))
        # Nothing is launched for a step without adapters.
        effects = () if batch is None else effects_of(self._pool, batch, self._base.residual)
        norms = () if outside is None else norm_effects(self._pool, outside)
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
            effects=effects,
            norms=norms,
            head=() if sampled is None else head_effects(self._pool, sampled, vocabulary),
            added_tokens=int(added.max(initial=0)),
            unfused=acts_between(effects, norms),
        )

        def forward() -> torch.Tensor:
            with parallel.threads_for(plan.num_tokens * self._token_us):
                embeddings = self._embeddings(plan, token_ids, batch, outside)
                logits = self._forward(step, embeddings, positions, rows)
                if step.added_tokens:
                    columns = torch.arange(step.added_tokens, device=self._device)
                    missing = columns >= added_to[:, None]
                    logits[:, vocabulary.size :].masked_fill_(missing, -torch.inf)
                return logits

        return forward

    def _decode(self, step: StepContext, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] of every row, for the recordings."""
        return self._forward(step, self._embed(token_ids), positions, 0)

    def _forward(
        self,
        step: StepContext,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        logits_to_keep: torch.Tensor | int,
    ) -> torch.Tensor:
        """Logits of the rows `logits_to_keep` (int64 [S + Q]): [S + Q, vocabulary]. 0 keeps all rows.

        Args:
            embeddings: [T, hidden].
            positions: int64 [T].
        """
        with context.running(step):
            output = self._base.model(
                inputs_embeds=embeddings.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=logits_to_keep,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _embeddings(
        self, plan: StepPlan, token_ids: torch.Tensor, batch: LoraBatch | None, outside: LoraBatch | None
    ) -> torch.Tensor:
        """Embeddings [T, hidden] of the step's tokens.

        A negative token id is a row of a soft prompt; an id past the base's vocabulary is an adapter's token.

        Args:
            outside: `batch` if an adapter acts at a norm, the embedding or the head, else None.
        """
        site = self._base.vocabulary
        of_base = token_ids if outside is None else token_ids.clamp(max=site.size - 1)
        found: torch.Tensor = self._embed(of_base)
        if outside is not None:
            for effect in embedding_effects(self._pool, outside, site):
                effect.embed(site, token_ids, found)
        if batch is not None and (plan.token_ids < 0).any():
            vectors.place_soft_prompts(found, torch.from_numpy(plan.token_ids), self._pool, batch)
        return found

    def _sampled(self, plan: StepPlan, batch: LoraBatch) -> LoraBatch | None:
        """The part of the batch in the rows with logits; None if none of these rows has an adapter."""
        runs, rows = plan.runs, plan.logit_row
        owner = np.searchsorted(plan.run_start, rows, "right") - 1
        inside = (owner >= 0) & (rows < plan.run_end[owner])
        found = [
            (row, row + 1, runs[run][2])
            for row, (run, has) in enumerate(zip(owner.tolist(), inside.tolist(), strict=True))
            if has
        ]
        return self._sampled_segments.fill(found) if found else None

    def _added_tokens(self, plan: StepPlan, sampled: LoraBatch | None) -> Ints:
        """Number of tokens that the adapter of each row with logits adds to the vocabulary, [S + Q]."""
        added: Ints = np.zeros(len(plan.logit_row), np.int64)
        if sampled is not None:
            site = self._base.vocabulary
            found = ends.added_tokens(self._pool, sampled, site.head.first_entry, site.size)
            added[: len(found)] = found
        return added
