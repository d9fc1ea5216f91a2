"""Decode steps as CUDA graphs, recorded for some batch sizes at start; a step is padded to the next size.

A decode step, in which every sequence computes one token, is hundreds of small kernels. Launching them one by
one takes longer than running them; a recording replays them in one launch. Its inputs are at fixed addresses:
token ids, positions, the attention's tables, the adapters' segments. A step fills them in three copies and
replays. Padding tokens have the id 0, are written to no cell and use no adapter. Draft tokens are rows like
any other: each attends to the blocks of its sequence, which by then hold all keys and values of the step.

Each size has two recordings: one for steps without adapters, which launches no adapter kernels, and one for
LoRA pairs in any number and mix. Other effects of adapters are not recorded: `prepare` then returns None, and
the step is launched kernel by kernel.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from loraplex_kernels.attention import AttentionBuffers, LayerShape
from loraplex_kernels.pool import LoraBatchBuffers, LoraPool
from loraplex_server.core.step import Ints, StepPlan
from loraplex_server.model.layers.context import StepContext
from loraplex_server.model.layers.effects import Effect, Kinds, acts_outside, effects_of, kinds
from loraplex_server.model.run.recording import Work, recorder
from loraplex_server.model.run.transfer import pins, send

_log = logging.getLogger(__name__)


class Forward(Protocol):
    """The model's part of a step."""

    def __call__(self, step: StepContext, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] of every token, from `token_ids` and `positions`, both int64 [T]."""


@dataclasses.dataclass(frozen=True)
class GraphLimits:
    """The sizes of the recordings, and limits of the steps that they have room for.

    Attributes:
        sizes: numbers of tokens that are recorded; a step is padded to one of them.
        block_size: tokens per KV block.
        num_blocks: number of KV blocks in the cache.
        max_blocks_per_sequence: longest block table.
        max_pairs_per_token: most adapters of one token.
    """

    sizes: tuple[int, ...]
    block_size: int
    num_blocks: int
    max_blocks_per_sequence: int
    max_pairs_per_token: int

    def blocks(self, size: int) -> int:
        """Total length of the block tables that a recording of `size` sequences has room for.

        Sequences may share blocks, so their tables can be longer than the cache. Twice the cache's blocks is
        less than the worst case, but enough in practice.
        """
        return min(size * self.max_blocks_per_sequence, 2 * self.num_blocks)

    def pairs(self, size: int) -> int:
        """Number of (token, adapter) pairs that a recording of `size` tokens has room for.

        Half the tokens may have a second adapter. More room would cost every step idle kernel programs.
        """
        return max(size + size // 2, self.max_pairs_per_token)


def ladder(most: int) -> tuple[int, ...]:
    """Sizes up to `most`, close enough to waste little on padding: 1, 2, 4, then steps of 8, 16 and 32."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, most + 1, 32)]
    return (*(size for size in sizes if size < most), most)


class DecodeGraphs:
    """The recorded decode steps of one model over one KV cache and one pool of adapters."""

    def __init__(
        self,
        forward: Forward,
        pool: LoraPool,
        layers: Iterable[LayerShape],
        limits: GraphLimits,
        device: torch.device,
    ) -> None:
        """Allocates the inputs; `record` makes the recordings.

        Args:
            layers: shapes of the attention in each layer.

        Raises:
            ValueError: the device uses the torch references, which have no kernels of fixed sizes.
        """
        self._forward = forward
        self._pool = pool
        self._device = device
        self._largest = max(limits.sizes)
        # Token ids; positions; `fed_row`; `fed_from`.
        self._inputs = torch.zeros(4, self._largest, dtype=torch.int64, device=device)
        self._logits: torch.Tensor | None = None
        shapes = tuple(dict.fromkeys(layers))
        self._buckets = [_Bucket(size, limits, shapes, pool, device) for size in sorted(set(limits.sizes))]

    @torch.inference_mode()
    def record(self, caches: tuple[torch.Tensor, ...]) -> None:
        """Makes every recording over these KV caches, the largest first: the others reuse its memory."""
        started_s = time.monotonic()
        record = recorder(self._device)
        for done, bucket in enumerate(reversed(self._buckets)):
            attention = bucket.attention.fill([0], [], [0], [], [])
            pairs = bucket.lora.fill([(0, 1, ((0, 1.0),))])
            for effects in ((), effects_of(self._pool, pairs)):
                step = StepContext(attention, caches, effects)
                bucket.replays[kinds(effects)] = record(self._work(step, bucket.size))
            if not done % 8 or bucket is self._buckets[0]:
                _log.info(
                    "CUDA graphs: recorded %d of %d decode sizes, %.1f s",
                    done + 1,
                    len(self._buckets),
                    time.monotonic() - started_s,
                )
        if self._device.type == "cuda":
            # Memory that the allocator kept for the recording's stream, which is not needed any more.
            torch.cuda.empty_cache()

    def prepare(
        self, plan: StepPlan, tokens: torch.Tensor | None = None
    ) -> Callable[[], torch.Tensor] | None:
        """Fills the inputs for a step.

        Args:
            tokens: int64 [S] on the device, the tokens that the previous step sampled; needed if the plan has
                `fed_row`.

        Returns:
            A function that launches the step and returns the logits [S, vocabulary] of the plan's
            `sample_row`, valid until the next launch. None if no recording fits the step.
        """
        rows = row_by_row(plan)
        bucket = None if rows is None else self._bucket(plan, rows)
        if rows is None or bucket is None:
            return None
        effects: tuple[Effect, ...] = ()
        if len(plan.run_start):
            pairs = bucket.lora.fill(plan.runs)
            if acts_outside(self._pool, pairs):
                return None
            effects = effects_of(self._pool, pairs)
        replay = bucket.replays.get(kinds(effects))
        if replay is None:
            return None
        bucket.attention.fill(*rows, plan.slot_mapping)
        count = plan.num_tokens
        # New memory for each step: the allocator of pinned memory reuses it only after the copy is done.
        inputs = torch.zeros(self._inputs.shape, dtype=torch.int64, pin_memory=pins(self._device))
        values = inputs.numpy()
        values[0, :count], values[1, :count] = plan.token_ids, plan.positions
        fed = len(plan.fed_row)
        values[2, :fed], values[3, :fed] = plan.fed_row, plan.fed_from
        self._inputs.copy_(inputs, non_blocking=True)
        if fed:
            assert tokens is not None
            known = tokens.index_select(0, self._inputs[3, :fed])
            self._inputs[0].index_copy_(0, self._inputs[2, :fed], known)
        sampled = None
        if not np.array_equal(plan.sample_row, np.arange(count)):
            sampled = send([plan.sample_row], self._device)[0]

        def launch() -> torch.Tensor:
            replay()
            assert self._logits is not None
            logits = self._logits[:count]
            return logits if sampled is None else logits.index_select(0, sampled)

        return launch

    def _bucket(self, plan: StepPlan, rows: Rows) -> _Bucket | None:
        """The smallest recorded size with room for the step; None if there is none.

        Steps with virtual tokens or with scores are not recorded.
        """
        count = plan.num_tokens
        if count > self._largest or not count or len(plan.score_row) or (plan.token_ids < 0).any():
            return None
        pairs = (
            int((plan.run_end - plan.run_start) @ np.diff(plan.run_pair_start)) if len(plan.run_start) else 0
        )
        for bucket in self._buckets:
            if bucket.has_room(count, len(rows.blocks), pairs):
                return bucket
        return None

    def _work(self, step: StepContext, size: int) -> Work:
        """The work of one recording: it refers to the inputs' addresses, never to a step's values."""
        token_ids, positions = self._inputs[0, :size], self._inputs[1, :size]

        def work() -> None:
            logits = self._forward(step, token_ids, positions)
            if self._logits is None:
                self._logits = torch.empty(
                    self._largest, logits.shape[-1], dtype=logits.dtype, device=logits.device
                )
            # One tensor for the logits of all sizes: separate ones would take more than the KV cache.
            self._logits[:size].copy_(logits)

        return work


class Rows(NamedTuple):
    """A step's attention with one sequence per row; fields as in `StepPlan`, with B = T."""

    query_start: Ints
    context_len: Ints
    block_start: Ints
    blocks: Ints


def row_by_row(plan: StepPlan) -> Rows | None:
    """The attention of a decode step with one sequence per row, draft tokens included.

    A decode step has one token per sequence, or samples after every token. None for any other step.
    """
    count = plan.num_tokens
    if count == plan.num_sequences:
        if (np.diff(plan.query_start) != 1).any():
            return None
        return Rows(plan.query_start, plan.context_len, plan.block_start, plan.blocks)
    if len(plan.sample_row) != count:
        return None
    # Each row gets a copy of its sequence's block table.
    owner = np.repeat(np.arange(plan.num_sequences), np.diff(plan.query_start))
    lengths = np.diff(plan.block_start)[owner]
    block_start = np.concatenate([[0], lengths.cumsum()])
    within = np.arange(block_start[-1]) - np.repeat(block_start[:-1], lengths)
    blocks = plan.blocks[np.repeat(plan.block_start[:-1][owner], lengths) + within]
    return Rows(np.arange(count + 1), plan.positions + 1, block_start, blocks)


class _Bucket:
    """The inputs and recordings of one size."""

    def __init__(
        self,
        size: int,
        limits: GraphLimits,
        layers: Sequence[LayerShape],
        pool: LoraPool,
        device: torch.device,
    ) -> None:
        self.size = size
        self.replays: dict[Kinds, Work] = {}
        self.attention = AttentionBuffers(
            max_tokens=size,
            max_sequences=size,
            max_blocks=limits.blocks(size),
            block_size=limits.block_size,
            layers=layers,
            device=device,
        )
        self.lora = LoraBatchBuffers(
            max_tokens=size,
            max_pairs=limits.pairs(size),
            max_segments=pool.num_slots,
            device=device,
            fixed_grid=True,
        )

    def has_room(self, tokens: int, blocks: int, pairs: int) -> bool:
        return tokens <= self.size and blocks <= self.attention.max_blocks and pairs <= self.lora.max_pairs
