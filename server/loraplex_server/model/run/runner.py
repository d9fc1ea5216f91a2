"""A step plan in, one sampled token for each finished row out."""

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
    """Seconds of the host: for the inputs, in the forward pass, in the sampler."""

    prepare_s: float
    forward_s: float
    sample_s: float


class Pending:
    """A step that was launched, and that the device may still be computing."""

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
        """What the step sampled and scored, once it is there."""
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
        """`max_samples`: most rows sampled or scored in a step, 0 for all of its tokens. `layers`: shapes of
        the attention, as the self-check saw them; their tables travel together.
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
        # An elementwise op on the widest activation: four times the hidden size, eight bytes a nanosecond.
        self._token_us = 4 * self._embed.weight.shape[-1] * 4 / 8_000
        self._segments, self._sampled_segments = (
            LoraBatchBuffers(max_tokens=tokens, max_pairs=tokens * max_pairs_per_token, device=self._device)
            for tokens in (max_batch_tokens, max_samples or max_batch_tokens)
        )
        self._clock = DeviceClock(self._device)
        self._graphs: DecodeGraphs | None = None
        # Those that the last launched step sampled, [S] int64 on the device.
        self._tokens: torch.Tensor | None = None

    @property
    def asynchronous(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return self._device.type == "cuda"

    def warm_up(self, max_context: int) -> None:
        """Runs steps of every kind, so that none has to wait for a kernel to be compiled or loaded.

        What they write lies in block 0, before any request has it.

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
        """Records decode steps of these numbers of sequences; from here on they are replayed.

        Args:
            max_context: tokens of the longest request.

        Raises:
            RuntimeError: the device refuses; steps are launched kernel by kernel, as before.
            ValueError: the device's kernels are torch.
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
        """`launch`, and the result waited for."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Computes every token of the plan, writes its keys and values, samples, and scores.

        On a GPU all of it is queued, in order, and nothing waits; elsewhere it is done on return.
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
        """Next-token logits [S + Q, vocabulary] of the plan's `logit_row`, valid until the next step."""
        return self._prepare(plan)()

    def usable(self) -> bool:
        """Whether the device still computes, asked after a step that failed.

        An illegal access, say, leaves a CUDA context in which every call fails from then on.
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
        """SHA-256 over the resident base weights, in pieces: yields between them, returns it at the end."""
        return self._base.checksum_steps()

    def _prepare(self, plan: StepPlan) -> Callable[[], torch.Tensor]:
        """Sends a step's inputs on their way; what is returned computes its logits."""
        place_prefixes(plan, self._pool, self._kv_caches)
        replay = None if self._graphs is None else self._graphs.prepare(plan, self._tokens)
        return self._eager(plan) if replay is None else replay

    def _eager(self, plan: StepPlan) -> Callable[[], torch.Tensor]:
        """The step kernel by kernel."""
        batch = self._segments.fill(plan.runs) if len(plan.run_start) else None
        # Most steps have adapters of the layers' projections alone, or none, and pay for nothing else.
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
        """Logits of every row, for the recordings."""
        return self._forward(step, self._embed(token_ids), positions, 0)

    def _forward(
        self,
        step: StepContext,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        logits_to_keep: torch.Tensor | int,
    ) -> torch.Tensor:
        """Logits [S, vocabulary] of the rows `logits_to_keep`, of all where that is 0."""
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
        """[T, hidden]; a negative token id is a row of a soft prompt, one past the base's an adapter's."""
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
        """The batch of the rows with logits alone, None where no adapter does anything at the head."""
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
        """[S + Q]: how many tokens the adapter of each row with logits adds to the vocabulary."""
        added: Ints = np.zeros(len(plan.logit_row), np.int64)
        if sampled is not None:
            site = self._base.vocabulary
            found = ends.added_tokens(self._pool, sampled, site.head.first_entry, site.size)
            added[: len(found)] = found
        return added
