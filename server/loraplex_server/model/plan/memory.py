"""The memory plan: everything that serving will take on the device, added up before it is allocated.

    of the device's memory, up to --gpu-memory-utilization
    ├── in use already     other processes, and the driver's own
    ├── base weights       from the checkpoint's header and the format
    ├── adapters           arena, tables, and the segments of a step
    ├── workspace          activations, logits and the kernels' scratch memory in the largest step
    ├── CUDA graphs        inputs and activations of recorded decode steps
    ├── reserve            memory held by libraries and the allocator
    └── KV cache           all whole blocks that fit in the rest, or --kv-cache-bytes

On a CPU the budget is the available memory, and the KV cache takes only what a full set of requests needs.
"""

from __future__ import annotations

import dataclasses

import torch

from loraplex_kernels.pool import LoraBatchBuffers, LoraPool
from loraplex_server.config import EngineConfig, SchedulerConfig
from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.plan import workspace
from loraplex_server.model.plan.available import available_bytes
from loraplex_server.model.plan.workspace import StepSize
from loraplex_server.model.run.graphs import GraphLimits
from loraplex_server.model.run.kv_cache import block_bytes, kv_dtype

# A CPU's default KV cache holds this many tokens per request, but takes at most `_CPU_SHARE` of the rest.
_DEFAULT_TOKENS_PER_REQUEST = 512
_CPU_SHARE = 0.25
# An estimate of cuBLAS' workspaces, the kernels' code and the caching allocator's fragmentation.
_CUDA_RESERVE = 384 << 20
# The lowest compute capability for which Triton supports 8-bit floats.
_NARROW_FLOATS = (8, 9)

WORKSPACE = "workspace of a step"


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the plan; `flags` are the command-line flags that change its size."""

    name: str
    num_bytes: int
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory that serving will take on the device.

    Attributes:
        device: description of the budget for error texts, for example "90% of 79.1 GiB on cuda".
        budget: bytes that serving may use.
        parts: the lines of the plan; the last one is the KV cache.
        num_blocks: number of KV blocks.
    """

    device: str
    budget: int
    parts: tuple[Part, ...]
    num_blocks: int

    def table(self) -> str:
        """The plan as text: name, MiB, bytes and share of the budget of each part, then the free rest."""
        total = sum(part.num_bytes for part in self.parts)
        rows = [(part.name, part.num_bytes) for part in self.parts]
        rows += [("free", self.budget - total), ("budget", self.budget)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"  {name:<{width}} {size / 2**20:>11.1f} MiB {size:>15} B {size / max(self.budget, 1):>7.1%}"
            for name, size in rows
        )


def make_plan(
    empty: EmptyModel,
    pool: LoraPool,
    config: EngineConfig,
    max_model_len: int,
    *,
    triton: bool,
    graph_sizes: tuple[int, ...] = (),
) -> MemoryPlan:
    """The plan for a model that is not loaded yet. It allocates nothing on the device.

    Args:
        pool: the adapters' pool with its final sizes, on the meta device.
        max_model_len: longest request, in tokens.
        triton: True if Triton's kernels will run.
        graph_sizes: batch sizes for which decode steps will be recorded.

    Raises:
        FailedPreconditionError: the plan does not fit; the text has all figures and says what to change.
        InvalidArgumentError: an fp8 KV cache is asked for, which Triton does not support on this device.
    """
    device, dtype, scheduler = empty.format.device, empty.format.dtype, config.scheduler
    on_gpu = device.type == "cuda"
    if scheduler.kv_cache_dtype == "fp8" and triton and on_gpu:
        _check_narrow_floats(device)
    cache_dtype = kv_dtype(scheduler, dtype)
    per_block = block_bytes(empty.kv_shapes, scheduler.kv_block_size, cache_dtype)
    fixed = _fixed_parts(empty, pool, config)
    if graph_sizes:
        limits = GraphLimits(
            sizes=graph_sizes,
            block_size=scheduler.kv_block_size,
            # An upper bound: the number of blocks that the whole device would hold.
            num_blocks=_total_bytes(device) // per_block,
            max_blocks_per_sequence=-(-max_model_len // scheduler.kv_block_size),
            max_pairs_per_token=config.adapters.max_per_request,
        )
        graphs = workspace.graph_bytes(empty, limits, pool.max_rank, pool.num_slots)
        fixed.append(Part("CUDA graphs", graphs, ("--cuda-graphs", "--cuda-graph-sizes")))
    if on_gpu:
        # Memory that this process has freed stays with its allocator; return it, so that it counts as free.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        fixed = [Part("in use already", total - free), *fixed, Part("reserve", _CUDA_RESERVE)]
        budget = int(total * scheduler.gpu_memory_utilization)
        share = f"{scheduler.gpu_memory_utilization:.0%} of {total / 2**30:.1f} GiB on {device}"
    else:
        budget = available_bytes()
        share = f"what is available on {device}"
    remaining = budget - sum(part.num_bytes for part in fixed)
    blocks = _num_blocks(scheduler, per_block, max_model_len, remaining, device)
    shown = "fp8" if scheduler.kv_cache_dtype == "fp8" else str(dtype).removeprefix("torch.")
    flags = ("--kv-cache-bytes", "--kv-cache-dtype", "--kv-block-size")
    kv = Part(f"KV cache ({shown})", blocks * per_block, flags)
    found = MemoryPlan(share, budget, (*fixed, kv), blocks)
    _check(found, per_block, scheduler, cuda=on_gpu)
    return found


def _fixed_parts(empty: EmptyModel, pool: LoraPool, config: EngineConfig) -> list[Part]:
    """The parts that every device needs, with recorded steps or without."""
    samples = max_samples(config)
    step = StepSize(
        config.scheduler.max_batch_tokens,
        samples,
        _max_pairs(config),
        pool.max_rank,
        max_logit_rows(config) - samples,
    )
    return [
        Part(
            f"base weights ({empty.format.quantization})",
            empty.weight_bytes,
            ("--quantization", "--double-quant"),
        ),
        Part("adapters", pool.arena.nbytes, ("--adapter-device-bytes",)),
        Part("adapter tables", pool.nbytes - pool.arena.nbytes, ("--max-adapters-on-device",)),
        Part(
            "adapter segments", _segment_bytes(config), ("--max-batch-tokens", "--max-adapters-per-request")
        ),
        Part(
            WORKSPACE,
            workspace.step_bytes(empty, step),
            ("--max-batch-tokens", "--max-num-requests", "--max-scored-tokens"),
        ),
    ]


def reserve_workspace(plan: MemoryPlan, device: torch.device) -> None:
    """Makes CUDA's allocator take a step's workspace now, so that no step has to wait for the driver.

    The allocator first returns its unused memory, which may be fragmented. On a CPU nothing happens.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        size = sum(part.num_bytes for part in plan.parts if part.name == WORKSPACE)
        taken = torch.empty(size, dtype=torch.uint8, device=device)
        del taken


def _segment_bytes(config: EngineConfig) -> int:
    """Bytes of a step's segments: one set for all tokens, one for the rows with logits."""
    meta = torch.device("meta")
    tokens = LoraBatchBuffers(
        max_tokens=config.scheduler.max_batch_tokens, max_pairs=_max_pairs(config), device=meta
    )
    sampled = LoraBatchBuffers(
        max_tokens=max_logit_rows(config),
        max_pairs=max_logit_rows(config) * config.adapters.max_per_request,
        device=meta,
    )
    return tokens.nbytes + sampled.nbytes


def max_samples(config: EngineConfig) -> int:
    """Most rows of one step for which a token is sampled."""
    return config.scheduler.max_samples


def max_logit_rows(config: EngineConfig) -> int:
    """Most rows of one step for which a token is sampled or scored."""
    scheduler = config.scheduler
    return min(scheduler.max_num_requests + scheduler.max_scored_tokens, scheduler.max_batch_tokens)


def _total_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_bytes()


def _max_pairs(config: EngineConfig) -> int:
    return config.scheduler.max_batch_tokens * config.adapters.max_per_request


def _num_blocks(
    config: SchedulerConfig, per_block: int, max_model_len: int, remaining: int, device: torch.device
) -> int:
    if config.kv_cache_bytes:
        return config.kv_cache_bytes // per_block
    if device.type == "cuda":
        return max(remaining, 0) // per_block
    tokens = config.max_num_requests * min(max_model_len, _DEFAULT_TOKENS_PER_REQUEST)
    wanted = max(tokens, max_model_len) // config.kv_block_size + config.max_num_requests
    return min(wanted, int(max(remaining, 0) * _CPU_SHARE) // per_block)


def _check(plan: MemoryPlan, per_block: int, config: SchedulerConfig, *, cuda: bool) -> None:
    total = sum(part.num_bytes for part in plan.parts)
    least = 2 * per_block
    short = max(total - plan.budget, 0)
    if plan.num_blocks < 2:
        short = max(short, total - plan.parts[-1].num_bytes + least - plan.budget)
    if plan.num_blocks >= 2 and not short:
        return
    if not short:
        raise FailedPreconditionError(
            f"the KV cache has room for {plan.num_blocks} blocks of {config.kv_block_size} tokens "
            f"({per_block} bytes each); give --kv-cache-bytes at least {least}\n{plan.table()}"
        )
    helpful = [part for part in plan.parts if part.flags and part.num_bytes]
    helpful.sort(key=lambda part: -part.num_bytes)
    advice = "; ".join(f"{part.name}: {', '.join(part.flags)}" for part in helpful[:3])
    more = "raise --gpu-memory-utilization, or " if cuda else ""
    raise FailedPreconditionError(
        f"serving would take {short} bytes ({short / 2**20:.1f} MiB) more than {plan.device} "
        f"(the least KV cache is {least} bytes):\n{plan.table()}\n"
        f"{more}lower the largest parts with their flags: {advice}"
    )


def _check_narrow_floats(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < _NARROW_FLOATS:
        raise InvalidArgumentError.field(
            "kv_cache_dtype",
            "Triton's kernels need compute capability 8.9 for fp8; use auto, or --kernels torch",
        )
