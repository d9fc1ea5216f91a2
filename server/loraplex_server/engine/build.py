"""From a configuration to a running engine: base model, adapter store, KV cache, runner."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from loraplex_kernels import dispatch, parallel
from loraplex_kernels.attention import LayerShape
from loraplex_kernels.pool import LoraPool
from loraplex_server.adapters.residency.device_tier import planned_pool
from loraplex_server.adapters.residency.store import AdapterStore
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.config import EngineConfig
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.engine.audit import finish
from loraplex_server.engine.engine import Emit, Engine
from loraplex_server.engine.grammars import Grammars
from loraplex_server.engine.token_trie import load_token_trie
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.load import architecture, loader
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.load.frozen import FrozenProjections
from loraplex_server.model.load.generation_config import sampling_defaults
from loraplex_server.model.plan import memory
from loraplex_server.model.plan.memory import MemoryPlan
from loraplex_server.model.run.graphs import ladder
from loraplex_server.model.run.kv_cache import allocate_kv, kv_dtype
from loraplex_server.model.run.runner import ModelRunner
from loraplex_server.model.run.selfcheck import check_ragged
from loraplex_server.wire.messages import EngineInfo

_log = logging.getLogger(__name__)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's names for the parameters of `mallopt`."""

_MMAP_BYTES = 32 << 20
"""The largest threshold that glibc takes."""

_TRIM_BYTES = 256 << 20
"""More than the activations of a step take on a CPU."""


def build_engine(
    config: EngineConfig, emit: Emit, *, wake: Callable[[], None] | None = None, progress: bool = True
) -> Engine:
    """Loads everything and returns an engine with an empty queue.

    Args:
        wake: called, from any thread, when an adapter has arrived or a structure is compiled; an idle loop
            then steps again.

    Raises:
        ServerError: the model or the adapters cannot be served; the text says why.
    """
    _keep_freed_memory()
    parallel.set_threads(config.model.threads or max(1, (os.cpu_count() or 2) - 1))
    dispatch.set_kernels(config.model.kernels)
    empty, checkpoint = loader.prepare(config.model)
    device, dtype = empty.format.device, empty.format.dtype
    triton = dispatch.backend(device) == "triton"
    limit = architecture.longest_context(empty.config, config.scheduler.max_model_len)
    registry = _registry(empty)
    sizes = _graph_sizes(config, recordable=triton and device.type == "cuda")
    pool = planned_pool(registry, config.adapters, dtype)
    plan = memory.make_plan(empty, pool, config, limit, triton=triton, graph_sizes=sizes)
    _log.info("memory, of %s:\n%s", plan.device, plan.table())
    base = empty.fill(checkpoint, progress=progress)
    layers = check_ragged(base)
    if device.type == "cuda":
        # What quantising took is in the allocator's hands, in pieces.
        torch.cuda.empty_cache()
    adapters = AdapterStore(
        registry, config.adapters, device=device, dtype=dtype, base=_frozen_base(base), wake=wake
    )
    cached_tokens = plan.num_blocks * config.scheduler.kv_block_size
    if limit > cached_tokens:
        limit = cached_tokens
        _log.warning("the KV cache holds %d tokens: no request may be longer", limit)
    runner = _runner(base, plan, adapters.pool, config, layers)
    insisted = config.model.cuda_graphs == "on"
    _ready_device(runner, sizes, limit, on_gpu=device.type == "cuda", insisted=insisted)
    memory.reserve_workspace(plan, device)
    _register_folders(adapters, config.adapters.folders)
    info = _engine_info(config, base, plan, adapters, limit)
    _log_summary(info)
    grammars = Grammars(
        functools.partial(load_token_trie, config.model.model, info.vocab_size, info.eos_token_ids),
        info.vocab_size,
        wake,
    )
    return Engine(config, runner, adapters, info, emit, grammars)


def _runner(
    base: BaseModel, plan: MemoryPlan, pool: LoraPool, config: EngineConfig, layers: tuple[LayerShape, ...]
) -> ModelRunner:
    """The runner, with the KV cache that was planned for."""
    block_size = config.scheduler.kv_block_size
    cache_dtype = kv_dtype(config.scheduler, base.format.dtype)
    return ModelRunner(
        base,
        allocate_kv(base.kv_shapes, plan.num_blocks, block_size, cache_dtype, base.format.device),
        pool,
        block_size=block_size,
        max_batch_tokens=config.scheduler.max_batch_tokens,
        max_pairs_per_token=config.adapters.max_per_request,
        max_samples=memory.max_logit_rows(config),
        layers=layers,
    )


def _register_folders(adapters: AdapterStore, folders: Iterable[Path]) -> None:
    for folder in folders:
        begin_s = time.perf_counter()
        names = adapters.intake.register_folder(folder)
        seconds = time.perf_counter() - begin_s
        _log.info("registered %d adapters from %s in %.3f s", len(names), folder, seconds)


def _engine_info(
    config: EngineConfig, base: BaseModel, plan: MemoryPlan, adapters: AdapterStore, max_model_len: int
) -> EngineInfo:
    """The engine's description of itself, for its clients."""
    return EngineInfo(
        model=config.model.model,
        architecture=type(base.model).__name__,
        quantization=base.format.quantization,
        dtype=str(base.format.dtype).removeprefix("torch."),
        device=base.format.device.type,
        kernels=dispatch.backend(base.format.device),
        vocab_size=base.vocabulary.size,
        max_model_len=max_model_len,
        parameters=base.parameters,
        weight_bytes=base.weight_bytes,
        weight_checksum=finish(base.checksum_steps()),
        max_batch_tokens=config.scheduler.max_batch_tokens,
        max_num_requests=config.scheduler.max_num_requests,
        kv_block_size=config.scheduler.kv_block_size,
        kv_blocks=plan.num_blocks,
        adapter_device_bytes=config.adapters.device_bytes,
        adapter_host_bytes=config.adapters.host_bytes,
        max_adapters_on_device=config.adapters.max_on_device,
        adapter_slots=adapters.num_slots,
        eos_token_ids=base.eos_token_ids,
        sampling_defaults=sampling_defaults(config.model),
        memory=tuple((part.name, part.num_bytes) for part in plan.parts),
    )


def _log_summary(info: EngineInfo) -> None:
    _log.info(
        "base model: %.1f M parameters in %.1f MiB (%s, activations %s) on %s, kernels %s",
        info.parameters / 1e6,
        info.weight_bytes / 2**20,
        info.quantization,
        info.dtype,
        info.device,
        info.kernels,
    )
    _log.info(
        "KV cache: %d blocks of %d tokens; adapters on the device: %d at most",
        info.kv_blocks,
        info.kv_block_size,
        info.adapter_slots,
    )


def _graph_sizes(config: EngineConfig, *, recordable: bool) -> tuple[int, ...]:
    """Numbers of sequences for which decode steps are recorded; none where they are not."""
    wanted = config.model.cuda_graphs
    if wanted == "off" or (wanted == "auto" and not recordable):
        return ()
    most = config.scheduler.max_num_requests
    return tuple(size for size in config.model.cuda_graph_sizes if size <= most) or ladder(most)


def _ready_device(
    runner: ModelRunner, sizes: tuple[int, ...], max_model_len: int, *, on_gpu: bool, insisted: bool
) -> None:
    """Compiles the kernels and records the decode graphs, as far as the device has either.

    Raises:
        FailedPreconditionError: graphs were insisted on and there can be none.
    """
    if on_gpu:
        runner.warm_up(max_model_len)
    if not sizes:
        return
    try:
        runner.record_graphs(sizes, max_model_len)
    except (RuntimeError, ValueError) as error:
        if insisted:
            raise FailedPreconditionError(
                f"--cuda-graphs on: the decode steps cannot be recorded ({error})"
            ) from error
        _log.warning("no CUDA graphs, decode steps are launched kernel by kernel: %s", error)


def _registry(empty: EmptyModel) -> SiteRegistry:
    """The places of a model where adapters act, numbered as its parts are once they are loaded."""
    projections = [projection for group in empty.grouped for projection in group]
    outer = empty.embedding_and_head
    biased = {p.path for p in projections if p.has_bias}
    biased |= {norm.path for norm in empty.norms if norm.has_bias}
    return SiteRegistry(
        ((p.path, p.in_features, p.out_features) for p in projections),
        biased=biased | ({outer.head_path} if outer.head_has_bias else set()),
        hidden_size=outer.hidden_size,
        sharing={p.path for group in empty.grouped if len(group) > 1 for p in group},
        norms=((norm.path, norm.width) for norm in empty.norms),
        embedding=outer.embedding_path,
        head=outer.head_path,
        vocabulary=outer.tokens,
        tied=outer.tied,
        kv_shapes=empty.kv_shapes,
        model_type=empty.config.model_type,
        residual=empty.residual,
    )


def _frozen_base(base: BaseModel) -> FrozenProjections:
    """A base model's weights as the loading of adapters asks for them."""
    vocabulary = base.vocabulary
    return FrozenProjections(
        base.groups,
        (vocabulary.embedding_path, vocabulary.table),
        (vocabulary.head_path, vocabulary.head_table, vocabulary.head_bias),
    )


def _keep_freed_memory() -> None:
    """Has malloc keep the memory of a step's activations for the next step's.

    Given back, it is taken anew with a page fault for every 4 KiB. Only glibc is told so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
