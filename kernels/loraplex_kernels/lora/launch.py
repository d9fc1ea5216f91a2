"""The launch of the LoRA kernels: what a variant of `tiles` means in grids and compile-time arguments."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from loraplex_kernels import dispatch
from loraplex_kernels.lora import tiles
from loraplex_kernels.lora.kernel import expand_kernel, shrink_decode_kernel, shrink_stacked_kernel
from loraplex_kernels.pool import MAX_SLICES, RANK_ALIGN, LoraBatch, LoraPool, LoraSite

# The interpreter multiplies bfloat16 wrongly, and converts int8 to it wrongly; the same products in float32
# are exact.
_UPCAST = dispatch.interpreting()


def shrink_constants(
    config: tiles.LoraTiles, slices: int, even: bool, adapters: torch.dtype
) -> dict[str, int | bool]:
    """Compile-time arguments of the shrink that the variant and the type of the adapters decide; `even`: the
    planes need no mask.
    """
    constants = {
        "ROWS": config.rows,
        "RANK_ALIGN": RANK_ALIGN,
        "K_BLOCK": config.shrink_k,
        "EVEN": even,
    }
    if config.stacked:
        return {**constants, "SLICES": slices, "RANK_BLOCK": config.stacked_rank(slices)}
    return {
        **constants,
        "RANK_BLOCK": config.shrink_rank,
        "K_STEP": config.k_step,
        "VECTOR_K": config.vector_k,
        "VECTOR_ROWS": config.vector_rows,
        # What one thread loads at once it sums up before it meets the other threads.
        "LANE": 16 if adapters == torch.int8 else 8,
    }


def expand_constants(config: tiles.LoraTiles, planes: int, adapters: torch.dtype) -> dict[str, int | bool]:
    """Compile-time arguments of the expand that the variant and the type of the adapters decide."""
    return {
        "ROWS": config.rows,
        "RANK_BLOCK": config.expand_rank,
        "RANK_ALIGN": RANK_ALIGN,
        "COLUMN_BLOCK": config.expand_columns,
        "DOT_COLUMNS": config.dot_columns,
        "PLANES": planes,
        "VECTOR_ROWS": config.vector_rows,
        "SCALED": adapters == torch.int8,
    }


def shrink(x: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch) -> Tensor:
    """Launch the shrink for all slices: h is float32 ``[pair_rows, num_slices, planes, max_rank]``."""
    config = tiles.choose(batch.tile_rows, batch.pair_rows, pool.arena.dtype, x.dtype, x.device)
    slices = site.num_slices
    grid_slices = 1 if config.stacked else slices
    planes = tiles.planes(config, batch.shrink_tiles * grid_slices, site.in_features)
    h = torch.empty((batch.pair_rows, slices, planes, pool.max_rank), dtype=torch.float32, device=x.device)
    tile_grid = (batch.shrink_tiles, planes) if config.stacked else (batch.shrink_tiles, slices, planes)
    even = site.in_features % (planes * config.k_step) == 0
    chosen = shrink_stacked_kernel if config.stacked else shrink_decode_kernel
    chosen[tile_grid](
        x,
        pool.arena,
        pool.a_offset,
        pool.rank,
        batch.pair_token,
        batch.shrink_tile,
        h,
        x.stride(0),
        site.in_features,
        pool.num_entries,
        site.first_entry,
        H_PITCH=pool.max_rank,
        UPCAST=_UPCAST,
        num_warps=config.shrink_warps,
        num_stages=config.shrink_stages,
        **shrink_constants(config, slices, even, pool.arena.dtype),
        **_dependent_launch(config),
    )
    return h


def expand(h: Tensor, pool: LoraPool, site: LoraSite, batch: LoraBatch, y: Tensor) -> None:
    """Launch the expand for all slices of `site`, in place on y."""
    adapters = pool.arena.dtype
    config = tiles.choose(batch.tile_rows, batch.pair_rows, adapters, y.dtype, y.device)
    columns = [bound for slice_ in site.slices for bound in slice_]
    columns += [0] * (2 * (MAX_SLICES - site.num_slices))
    blocks = sum(triton.cdiv(width, config.expand_columns) for _, width in site.slices)
    expand_kernel[(batch.expand_tiles, blocks)](
        h,
        pool.arena,
        pool.arena.view(torch.float32) if adapters == torch.int8 else pool.arena,
        pool.b_offset,
        pool.rank,
        batch.pair_weight,
        batch.group_token,
        batch.expand_tile,
        batch.member,
        y,
        y.stride(0),
        *columns,
        pool.num_entries,
        site.first_entry,
        site.num_slices,
        H_PITCH=pool.max_rank,
        UPCAST=_UPCAST,
        num_warps=config.expand_warps,
        num_stages=config.expand_stages,
        **expand_constants(config, h.shape[2], adapters),
        **_dependent_launch(config),
    )


def _dependent_launch(config: tiles.LoraTiles) -> dict[str, bool]:
    """Arguments of a launch with or without programmatic dependent launch."""
    return {"PDL": True, "launch_pdl": True} if config.pdl else {"PDL": False}
