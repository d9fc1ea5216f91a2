"""A step's tables on the device, sent there in one copy: slots, tiles of each layer shape, block tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.attention import plan, tiles
from loraplex_kernels.attention.plan import Cut, Ints, Queries, TilePlan
from loraplex_kernels.attention.tiles import AttentionTiles, LayerShape

Words = npt.NDArray[np.int32]


class DeviceTables:
    """The tables of one step that the Triton kernels read. What `send` leaves out is sent on first use."""

    def __init__(
        self,
        queries: Queries,
        blocks: Ints,
        device: torch.device,
        *,
        sent_blocks: torch.Tensor | None = None,
        sent_plans: Mapping[LayerShape, TilePlan] | None = None,
    ) -> None:
        """Nothing is copied. With `sent_plans` (tables of fixed size) those are all there will ever be."""
        self._queries = queries
        self._host_blocks = blocks
        self._device = device
        self._blocks = sent_blocks
        self._plans = dict(sent_plans or {})
        self._closed = sent_plans is not None

    def send(self, slots: Ints, layers: Iterable[LayerShape]) -> torch.Tensor:
        """Copy the block tables, the plans of `layers` and `slots` at once; returns the slots [T] int64."""
        shapes = list(dict.fromkeys(layers))
        cuts = [self._cut(shape) for shape in shapes]
        arrays = [np.ascontiguousarray(slots).view(np.int32)]
        for _, cut in cuts:
            arrays += [cut.tile.astype(np.int32), cut.merge.astype(np.int32)]
        sent = pack([*arrays, self._host_blocks.astype(np.int32)], self._device)
        self._blocks = sent[-1]
        for index, (shape, (variant, cut)) in enumerate(zip(shapes, cuts, strict=True)):
            self._plans[shape] = tile_plan(variant, cut, *sent[1 + 2 * index : 3 + 2 * index])
        return sent[0].view(torch.int64)

    @property
    def blocks(self) -> torch.Tensor:
        """[sum of the tables' lengths] int32: the sequences' block tables one after the other."""
        if self._blocks is None:
            self._blocks = pack([self._host_blocks.astype(np.int32)], self._device)[0]
        return self._blocks

    def plan(self, shape: LayerShape) -> TilePlan:
        """The step's tiles for layers of `shape`. Raises ValueError where fixed tables were made without."""
        found = self._plans.get(shape)
        if found is None:
            if self._closed:
                raise ValueError(f"these buffers know no layers of {shape}: name it when they are made")
            variant, cut = self._cut(shape)
            sent = pack([cut.tile.astype(np.int32), cut.merge.astype(np.int32)], self._device)
            found = self._plans[shape] = tile_plan(variant, cut, *sent)
        return found

    def _cut(self, shape: LayerShape) -> tuple[AttentionTiles, Cut]:
        device = tiles.device_of(self._device)
        variant = plan.choose_tiles(self._queries, shape, roomy=device.roomy)
        return variant, plan.cut(self._queries, shape, variant, device.programs)


def tile_plan(variant: AttentionTiles, cut: Cut, tile: torch.Tensor, merge: torch.Tensor) -> TilePlan:
    """A plan of exactly the tiles of `cut`, whose arrays lie flat in `tile` and `merge`."""
    return TilePlan(
        variant,
        num_tiles=len(cut.tile),
        num_merges=len(cut.merge),
        num_planes=cut.num_planes,
        tile=tile.view(-1, plan.TILE_FIELDS),
        merge=merge.view(-1, plan.MERGE_FIELDS),
    )


def windows(sizes: Sequence[int]) -> tuple[list[slice], int]:
    """Places of arrays of `sizes` int32 words in one buffer, each at a multiple of 16 bytes; and its size."""
    starts = np.concatenate(([0], np.cumsum([-(-size // 4) * 4 for size in sizes])))
    places = [slice(int(start), int(start) + size) for start, size in zip(starts, sizes, strict=False)]
    return places, int(starts[-1])


def pack(arrays: Sequence[Words], device: torch.device) -> list[torch.Tensor]:
    """Copy int32 arrays to the device in one piece; returns each, flat."""
    places, total = windows([array.size for array in arrays])
    host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    words = host.numpy()
    for place, array in zip(places, arrays, strict=True):
        words[place] = array.reshape(-1)
    # The allocator of pinned memory keeps the source until the copy is done.
    packed = host.to(device, non_blocking=True)
    return [packed[place] for place in places]
