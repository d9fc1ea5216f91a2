"""Other projects' LoRA kernels, for the table alone.

Their files are not part of this repository: whoever wants the comparison puts them into `bench/.peers/`,
which git ignores (see `FILES`; the files of one release of each project, under these names)::

    bench/.peers/vllm/      from vllm/lora/ops/triton_ops/
    bench/.peers/sglang/    from sglang/kernels/ops/lora/dense/

vLLM's tuned configurations (``<card>_SHRINK.json``, ``<card>_EXPAND_TRUE.json``) are used where they lie in
`bench/.peers/vllm/configs/`; SGLang's where they lie in `bench/.peers/sglang/csgmv_configs/`. The little that
the files import from the rest of their projects is stood in for here. A peer that cannot run says why.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loraplex_bench.ops.lora_cases import POOL_ADAPTERS, Layers, rank_of_slot, runs_of
from loraplex_kernels import lora
from loraplex_kernels.pool import LoraBatch, LoraBatchBuffers

FOLDER = Path(__file__).parents[2] / ".peers"
FILES = {
    "vllm": (
        "kernel_utils.py",
        "utils.py",
        "lora_shrink_op.py",
        "lora_expand_op.py",
        "lora_kernel_metadata.py",
    ),
    "sglang": ("lora_tuning_config.py", "chunked_sgmv_shrink.py", "chunked_sgmv_expand.py"),
}
CHUNK = 16
"""SGLang's default for the rows of a segment."""


class PeerUnavailableError(Exception):
    """Why a peer is not run."""


class Peer(Protocol):
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
            raise PeerUnavailableError(f"gathers {largest * len(slots) / 2**30:.0f} GiB of weights")
        return torch.tensor(slots, device=self._device)

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: Tensor) -> None:
        for (a, b), (column, width) in zip(self._weights[name, copy], self._slices[name], strict=True):
            h = torch.bmm(a[batch], x.unsqueeze(2))
            y[:, column : column + width] += torch.bmm(b[batch], h).squeeze(2)


class VllmPeer:
    """vLLM's `_lora_shrink` and `_lora_expand`, the grid specialised to the number of active adapters."""

    name = "vLLM"

    def __init__(self, layers: Layers, folder: Path = FOLDER) -> None:
        shrink, expand, metadata = _load_vllm(folder / "vllm")
        self._shrink: Callable[..., None] = shrink
        self._expand: Callable[..., None] = expand
        self._metadata = metadata
        self._device, self._max_rank = layers.pool.arena.device, layers.max_rank
        if self._max_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise PeerUnavailableError(f"does not take a largest rank of {self._max_rank}")
        self._weights: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        for name in layers.sites:
            for copy in range(layers.copies):
                a, b = zip(*padded_weights(layers, name, copy), strict=True)
                self._weights[name, copy] = (list(a), list(b))

    def prepare(self, slots: Sequence[int]) -> Any:
        meta = self._metadata.make(POOL_ADAPTERS, len(slots), self._device)
        meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32))
        return meta.meta_args(len(slots), specialize_active_lora=True)

    def apply(self, x: Tensor, y: Tensor, name: str, copy: int, batch: Any) -> None:
        a, b = self._weights[name, copy]
        h = torch.empty(len(a), len(x), self._max_rank, dtype=torch.float32, device=x.device)
        self._shrink(x, a, h, *batch, 1.0)
        self._expand(h, b, y, *batch, offset_start=0, add_inputs=True)


class SglangPeer:
    """SGLang's csgmv backend: tokens sorted by adapter in chunks, the grid no larger than the chunks."""

    name = "SGLang csgmv"

    def __init__(self, layers: Layers, folder: Path = FOLDER) -> None:
        self._shrink, self._expand = _load_sglang(folder / "sglang")
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
        h = self._shrink(x, a, batch, len(host) - 1)
        self._expand(h, b, batch, offsets, widest, y, slice_offsets_cpu=host)


PEERS: tuple[Callable[[Layers], Peer], ...] = (OwnKernels, VllmPeer, SglangPeer, TorchBmm)
"""What the table compares, this project's op first."""


def _load_vllm(folder: Path) -> tuple[Callable[..., None], Callable[..., None], Any]:
    _need(folder, FILES["vllm"])
    import triton
    import triton.language

    configs = folder / "configs"
    if configs.is_dir():
        os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(configs)

    def next_power_of_2(n: int) -> int:
        return 1 if n < 1 else 1 << (n - 1).bit_length()

    def async_tensor_h2d(data: Any, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    cuda = torch.cuda.is_available()
    _stand_in(
        {
            "vllm": {},
            "vllm.envs": {
                "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
                "VLLM_BATCH_INVARIANT": False,
                "VLLM_LORA_DISABLE_PDL": False,
                "VLLM_LORA_DETERMINISTIC_SPLIT_K": False,
                "VLLM_LORA_ENABLE_DUAL_STREAM": False,
            },
            "vllm.triton_utils": {"tl": triton.language, "triton": triton},
            "vllm.logger": {"init_logger": lambda name: _Silence()},
            "vllm.platforms": {
                "current_platform": types.SimpleNamespace(
                    is_cuda=lambda: cuda,
                    has_device_capability=lambda least: (
                        cuda and torch.cuda.get_device_capability() >= divmod(least, 10)
                    ),
                )
            },
            "vllm.utils": {},
            "vllm.utils.math_utils": {"next_power_of_2": next_power_of_2},
            # An AttributeError here makes the files export their plain functions.
            "vllm.utils.torch_utils": {
                "direct_register_custom_op": _refuse,
                "async_tensor_h2d": async_tensor_h2d,
            },
            "vllm.model_executor": {},
            "vllm.model_executor.layers": {},
            "vllm.model_executor.layers.batch_invariant": {"vllm_is_batch_invariant": lambda: False},
            "vllm.lora": {},
            "vllm.lora.ops": {},
            "vllm.lora.ops.triton_ops": {},
        }
    )
    modules = _import_files(folder, "vllm.lora.ops.triton_ops", FILES["vllm"])
    return (
        modules["lora_shrink_op"]._lora_shrink,
        modules["lora_expand_op"]._lora_expand,
        modules["lora_kernel_metadata"].LoRAKernelMeta,
    )


def _load_sglang(folder: Path) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    _need(folder, FILES["sglang"])
    flag = types.SimpleNamespace(get=lambda: False)
    if (folder / "csgmv_configs").is_dir():
        os.environ["SGLANG_LORA_CONFIG_DIR"] = str(folder)
    _stand_in(
        {
            "sglang": {},
            "sglang.kernels": {},
            "sglang.kernels.ops": {},
            "sglang.kernels.ops.lora": {},
            "sglang.kernels.ops.lora.dense": {},
            "sglang.srt": {},
            "sglang.srt.environ": {
                "envs": types.SimpleNamespace(
                    SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=flag, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=flag
                )
            },
            "sglang.srt.lora": {},
            "sglang.srt.lora.utils": {"LoRABatchInfo": object},
            "sglang.srt.utils": {
                # It only shortens the launch on the host, which a captured graph leaves out anyway.
                "cached_triton_kernel": lambda key_fn=None: lambda kernel: kernel,
                "get_device_name": lambda: (
                    torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
                ),
            },
        }
    )
    modules = _import_files(folder, "sglang.kernels.ops.lora.dense", FILES["sglang"])
    return (
        modules["chunked_sgmv_shrink"].chunked_sgmv_lora_shrink_forward,
        modules["chunked_sgmv_expand"].chunked_sgmv_lora_expand_forward,
    )


class _Silence:
    """A logger that says nothing, under whatever name."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def _refuse(*arguments: object, **named: object) -> None:
    raise AttributeError("custom operators are not registered here")


def _need(folder: Path, files: Sequence[str]) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise PeerUnavailableError(f"bench/.peers/{folder.name} lacks {', '.join(missing)}")
    if importlib.util.find_spec("triton") is None:
        raise PeerUnavailableError("triton is not installed")


def _stand_in(modules: dict[str, dict[str, Any]]) -> None:
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _import_files(folder: Path, package: str, files: Sequence[str]) -> dict[str, Any]:
    modules = {}
    for file in files:
        stem = file.removesuffix(".py")
        name = f"{package}.{stem}"
        spec = importlib.util.spec_from_file_location(name, folder / file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise PeerUnavailableError(f"{file} does not load here: {error}") from error
        modules[stem] = module
    return modules
