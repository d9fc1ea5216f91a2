"""Attention metadata of fixed capacity at fixed addresses, as a CUDA graph needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels import dispatch
from loraplex_kernels.attention import packed, plan, tiles
from loraplex_kernels.attention.batch import AttentionBatch, check_step
from loraplex_kernels.attention.packed import DeviceTables
from loraplex_kernels.attention.plan import Capacity, Cut, Queries, TilePlan
from loraplex_kernels.attention.tiles import AttentionTiles, LayerShape


class AttentionBuffers:
    """Preallocated metadata for the Triton kernels, filled once a step.

    Every batch from one object has `max_tokens` tokens and the same grids: capture with one object per graph,
    fill it, replay. Tokens past the last sequence are written nowhere, and their attention is zero. Sequences
    of any context length may follow those of the capture, as long as their block tables fit.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_sequences: int,
        max_blocks: int,
        block_size: int,
        layers: Sequence[LayerShape],
        device: torch.device | str,
    ) -> None:
        """Room for `max_tokens` queries of up to `max_sequences` sequences, whose block tables have up to
        `max_blocks` entries in all, in layers of the shapes `layers`.

        Raises ValueError if the device runs the torch references (they have no fixed sizes), and for heads
        wider than the Triton kernels support.
        """
        self._device = torch.device(device)
        if dispatch.backend(self._device) != "triton":
            raise ValueError(f"buffers of fixed size serve the Triton kernels alone; {device} runs torch")
        for shape in layers:
            if shape.head_dim > tiles.MAX_HEAD_DIM:
                raise ValueError(f"layers has heads of {shape.head_dim}, more than {tiles.MAX_HEAD_DIM}")
        self.max_tokens, self.max_sequences, self.max_blocks = max_tokens, max_sequences, max_blocks
        self._block_size = block_size
        self._programs = tiles.device_of(self._device).programs
        self._layers: dict[LayerShape, tuple[AttentionTiles, Capacity]] = {
            shape: self._bounds(shape) for shape in layers
        }
        sizes = [2 * max_tokens]
        for _, capacity in self._layers.values():
            sizes += [capacity.tiles * plan.TILE_FIELDS, capacity.merges * plan.MERGE_FIELDS]
        places, total = packed.windows([*sizes, max_blocks])
        pinned = self._device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=pinned)
        self._copy = torch.zeros(total, dtype=torch.int32, device=self._device)
        self._copied = torch.cuda.Event() if pinned else None
        words = self._host.numpy()
        self._words = [words[place] for place in places]
        self._blocks_start = places[-1].start
        sent = [self._copy[place] for place in places]
        self._slots, self._blocks = sent[0].view(torch.int64), sent[-1]
        self._plans = {
            shape: TilePlan(
                variant,
                capacity.tiles,
                capacity.merges,
                capacity.planes,
                sent[1 + 2 * index].view(-1, plan.TILE_FIELDS),
                sent[2 + 2 * index].view(-1, plan.MERGE_FIELDS),
            )
            for index, (shape, (variant, capacity)) in enumerate(self._layers.items())
        }

    def fill(
        self,
        query_start: npt.ArrayLike,
        context_len: npt.ArrayLike,
        block_start: npt.ArrayLike,
        blocks: npt.ArrayLike,
        slot_mapping: npt.ArrayLike,
    ) -> AttentionBatch:
        """Metadata of a step, as `AttentionBatch.build` takes it; one copy is queued on the current stream.

        The batch is valid until the next fill. Raises ValueError as `build` does, and for a step over the
        capacities.
        """
        step = check_step(
            query_start, context_len, block_start, blocks, slot_mapping, block_size=self._block_size
        )
        for name, needed, capacity in (
            ("max_tokens", step.slots.size, self.max_tokens),
            ("max_sequences", step.context_len.size, self.max_sequences),
            ("max_blocks", step.blocks.size, self.max_blocks),
        ):
            if needed > capacity:
                raise ValueError(f"the step needs {name} of at least {needed}, the buffers have {capacity}")
        queries = Queries.of(step.query_start, step.context_len, step.block_start)
        padded = Queries(
            token=np.append(queries.token, step.slots.size),
            query_len=np.append(queries.query_len, self.max_tokens - step.slots.size),
            context_len=np.append(queries.context_len, 0),
            table=np.append(queries.table, 0),
        )
        cuts = [self._cut(padded, shape, variant) for shape, (variant, _) in self._layers.items()]

        if self._copied is not None:
            self._copied.synchronize()
        slots = self._words[0].view(np.int64)
        slots[: step.slots.size], slots[step.slots.size :] = step.slots, -1
        for index, cut in enumerate(cuts):
            for words, rows in zip(self._words[1 + 2 * index :], (cut.tile, cut.merge), strict=False):
                words[: rows.size] = rows.reshape(-1)
                words[rows.size :] = 0
        self._words[-1][: step.blocks.size] = step.blocks
        used = slice(0, self._blocks_start + step.blocks.size)
        self._copy[used].copy_(self._host[used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return AttentionBatch(
            num_tokens=self.max_tokens,
            block_size=self._block_size,
            min_blocks=step.min_blocks,
            query_start=step.query_start,
            context_len=step.context_len,
            block_start=step.block_start,
            blocks=step.blocks,
            slots=self._slots,
            _tables=DeviceTables(
                queries, step.blocks, self._device, sent_blocks=self._blocks, sent_plans=self._plans
            ),
        )

    def _bounds(self, shape: LayerShape) -> tuple[AttentionTiles, Capacity]:
        """The variant for a full step of equal sequences, and room for any step's tiles of it."""
        sequences = max(self.max_sequences, 1)
        query_len = -(-self.max_tokens // sequences)
        each = np.full(sequences, query_len)
        even = Queries(token=each, query_len=each, context_len=each, table=each)
        variant = plan.choose_tiles(even, shape, roomy=tiles.device_of(self._device).roomy)
        return variant, plan.capacity(
            self.max_tokens, self.max_sequences, shape, variant.rows, self._programs
        )

    def _cut(self, queries: Queries, shape: LayerShape, variant: AttentionTiles) -> Cut:
        # The merge is launched in any case, so every division pays.
        return plan.cut(queries, shape, variant, self._programs, gain=0)
