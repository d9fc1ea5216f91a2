"""The LoRA op by this project's kernels, by the reference, by torch, and by vLLM's and SGLang's kernels."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loraplex_bench.ops.lora_cases import POOL_ADAPTERS, Layers, rank_of_slot, runs_of
from loraplex_bench.ops.registry import UnavailableError
from loraplex_bench.peers.folder import FOLDER
from loraplex_bench.peers.lora_kernels import load_sglang, load_vllm
from loraplex_kernels import lora
from loraplex_kernels.lora import reference
from loraplex_kernels.pool import LoraBatch, LoraBatchBuffers

CHUNK = 16
"""SGLang's default for the rows of a segment."""


class LoraOp(Protocol):
    """A contender with weights of its own. `prepare` may synchronise; `apply` is what is timed."""

    name: str

    def prepare(self, slots: Sequence[int]) -> Any:
        """A batch's metadata from the slot of each token."""

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: Any) -> None:
        """Adds the deltas of site `name` of copy `copy` to y."""


class OwnKernels:
    """This project's op, with the grids of a captured graph."""

    name = "loraplex"

    def __init__(self, layers: Layers) -> None:
        self._pool, self._sites = layers.pool, layers.sites

    def prepare(self, slots: Sequence[int]) -> LoraBatch:
        runs = runs_of(slots)
        buffers = LoraBatchBuffers(
            max_tokens=len(slots),
            max_pairs=len(slots),
            max_segments=len(runs),
            device=self._pool.arena.device,
            fixed_grid=True,
        )
        return buffers.fill(runs)

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: LoraBatch) -> None:
        lora.apply(x, y, self._pool, self._sites[name][copy], batch)


class Reference(OwnKernels):
    """The specification in plain torch, on the same pool."""

    name = "reference"

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: LoraBatch) -> None:
        reference.apply(x, y, self._pool, self._sites[name][copy], batch)


def padded_weights(layers: Layers, name: str, copy: int) -> list[tuple[Tensor, Tensor]]:
    """For each slice A ``[adapters, max_rank, in]`` and B ``[adapters, width, max_rank]``, zeros past the
    rank: the same numbers as in the pool.
    """
    site, pool = layers.sites[name][copy], layers.pool
    found = []
    for s, (_, width) in enumerate(site.slices):
        a = torch.zeros(
            POOL_ADAPTERS, layers.max_rank, site.in_features, dtype=pool.dtype, device=pool.arena.device
        )
        b = torch.zeros(POOL_ADAPTERS, width, layers.max_rank, dtype=pool.dtype, device=pool.arena.device)
        for slot in range(POOL_ADAPTERS):
            rows = pool.a(slot, site.first_entry + s, site.in_features)
            a[slot, : len(rows)] = rows
            b[slot, :, : len(rows)] = pool.b(slot, site.first_entry + s, width).T
        found.append((a, b))
    return found


class TorchBmm:
    """Gathered and padded: `torch.bmm` of every token's A and B, as is done without kernels."""

    name = "torch bmm"
    max_bytes = 8 << 30

    def __init__(self, layers: Layers) -> None:
        self._device = layers.pool.arena.device
        self._slices = {name: sites[0].slices for name, sites in layers.sites.items()}
        self._weights = {
            (name, copy): padded_weights(layers, name, copy)
            for name in layers.sites
            for copy in range(layers.copies)
        }

    def prepare(self, slots: Sequence[int]) -> Tensor:
        largest = max(
            max(a[0].numel(), b[0].numel()) * a.element_size()
            for weights in self._weights.values()
            for a, b in weights
        )
        if largest * len(slots) > self.max_bytes:
            raise UnavailableError(f"gathers {largest * len(slots) / 2**30:.0f} GiB of weights")
        return torch.tensor(slots, device=self._device)

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: Tensor) -> None:
        for (a, b), (column, width) in zip(self._weights[name, copy], self._slices[name], strict=True):
            h = torch.bmm(a[batch], x.unsqueeze(2))
            y[:, column : column + width] += torch.bmm(b[batch], h).squeeze(2)


class VllmPeer:
    """vLLM's `_lora_shrink` and `_lora_expand`, the grid specialised to the number of active adapters."""

    name = "vLLM"

    def __init__(self, layers: Layers, folder: Path = FOLDER) -> None:
        self._kernels = load_vllm(folder / "vllm")
        self._device, self._max_rank = layers.pool.arena.device, layers.max_rank
        if self._max_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise UnavailableError(f"does not take a largest rank of {self._max_rank}")
        self._weights: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        for name in layers.sites:
            for copy in range(layers.copies):
                a, b = zip(*padded_weights(layers, name, copy), strict=True)
                self._weights[name, copy] = (list(a), list(b))

    def prepare(self, slots: Sequence[int]) -> Any:
        meta = self._kernels.metadata.make(POOL_ADAPTERS, len(slots), self._device)
        meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32))
        return meta.meta_args(len(slots), specialize_active_lora=True)

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: Any) -> None:
        a, b = self._weights[name, copy]
        h = torch.empty(len(a), len(x), self._max_rank, dtype=torch.float32, device=x.device)
        self._kernels.shrink(x, a, h, *batch, 1.0)
        self._kernels.expand(h, b, y, *batch, offset_start=0, add_inputs=True)


class SglangPeer:
    """SGLang's csgmv backend: tokens sorted by adapter in chunks, the grid no larger than the chunks."""

    name = "SGLang csgmv"

    def __init__(self, layers: Layers, folder: Path = FOLDER) -> None:
        self._kernels = load_sglang(folder / "sglang")
        self._device, self._max_rank = layers.pool.arena.device, layers.max_rank
        self._ranks = [rank_of_slot(layers.ranks, slot) for slot in range(POOL_ADAPTERS)]
        self._weights: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._offsets: dict[str, tuple[Tensor, Tensor, int]] = {}
        for name, sites in layers.sites.items():
            bounds = [column for column, _ in sites[0].slices] + [sites[0].out_features]
            host = torch.tensor(bounds, dtype=torch.int32)
            widest = max(width for _, width in sites[0].slices)
            self._offsets[name] = (host.to(self._device), host, widest)
            for copy in range(layers.copies):
                self._weights[name, copy] = self._stack(padded_weights(layers, name, copy))

    def _stack(self, slices: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A of all slices one after the other at each adapter's own rank, B of all slices side by side."""
        adapters, _, inner = slices[0][0].shape
        a = slices[0][0].new_zeros(adapters, len(slices) * self._max_rank, inner)
        for slot, rank in enumerate(self._ranks):
            for s, (of_slice, _) in enumerate(slices):
                a[slot, s * rank : (s + 1) * rank] = of_slice[slot, :rank]
        return a, torch.cat([b for _, b in slices], dim=1).contiguous()

    def prepare(self, slots: Sequence[int]) -> Any:
        order = sorted(range(len(slots)), key=lambda token: slots[token])
        weight_indices: list[int] = []
        bounds = [0]
        for position, token in enumerate(order):
            full = position - bounds[-1] >= CHUNK
            if position and (full or slots[token] != slots[order[position - 1]]):
                bounds.append(position)
            if len(weight_indices) < len(bounds):
                weight_indices.append(slots[token])
        bounds.append(len(slots))

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self._device)

        return types.SimpleNamespace(
            use_cuda_graph=False,
            bs=len(slots),
            num_segments=len(weight_indices),
            seg_indptr=tensor(bounds),
            weight_indices=tensor(weight_indices),
            lora_ranks=tensor(self._ranks),
            scalings=torch.ones(POOL_ADAPTERS, device=self._device),
            max_len=CHUNK,
            seg_lens=None,
            permutation=tensor(order),
        )

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: Any) -> None:
        a, b = self._weights[name, copy]
        offsets, host, widest = self._offsets[name]
        h = self._kernels.shrink(x, a, batch, len(host) - 1)
        self._kernels.expand(h, b, batch, offsets, widest, y, slice_offsets_cpu=host)


PEERS: tuple[Callable[[Layers], LoraOp], ...] = (VllmPeer, SglangPeer, TorchBmm)
"""The other projects' ops, and torch's."""
