"""The networks in plain torch; the tokens of each network are computed once per batch and site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels import dense, dispatch
from loraplex_kernels.parallel import PRODUCTS_PER_US, threads_for
from loraplex_kernels.pool import BottleneckReads, LoraBatch, LoraPool, LoraSite, VectorKind


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "leaky_relu": F.leaky_relu,
    "leakyrelu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""The functions allowed for f, by their names in transformers."""


@dataclass(frozen=True, eq=False)
class Network:
    """One adapter's network at one site.

    - `tokens` int64 ``[n]``, the rows of the batch that use it
    - `down`, `up` ``[b, H]``, `down_bias` ``[b]``, `up_bias` ``[H]``, in the pool's compute dtype
    """

    tokens: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    non_linearity: Callable[[Tensor], Tensor]
    reads: BottleneckReads

    @property
    def reads_residual(self) -> bool:
        return self.reads is not BottleneckReads.OUTPUT


def any_networks(pool: LoraPool, batch: LoraBatch) -> bool:
    return any(slot in pool.host.bottleneck for slot in batch.host.segment[:, 0].tolist())


def networks(pool: LoraPool, batch: LoraBatch, site: LoraSite) -> tuple[Network, ...]:
    """The networks of the batch's adapters at a site; kept with the batch."""
    key = ("bottleneck", pool, site)
    return batch.derived(key, pool.host.version, lambda: _networks(pool, batch, site))


def _networks(pool: LoraPool, batch: LoraBatch, site: LoraSite) -> tuple[Network, ...]:
    entry, width, found = site.first_entry, site.out_features, []
    for slot, first, end in batch.host.segment.tolist():
        form = pool.host.bottleneck.get(slot)
        if form is None or entry not in form.widths:
            continue
        rows = form.widths[entry]
        if ("bottleneck", slot) not in batch.cache:
            tokens = torch.from_numpy(batch.host.pair_token[first:end]).to(pool.arena.device)
            batch.cache["bottleneck", slot] = tokens
        found.append(
            Network(
                tokens=batch.cache["bottleneck", slot],
                down=pool.block(slot, VectorKind.DOWN, entry, width, 0, rows),
                down_bias=pool.vector(slot, VectorKind.DOWN_BIAS, entry, rows),
                up=pool.block(slot, VectorKind.UP, entry, width, 0, rows),
                up_bias=pool.vector(slot, VectorKind.UP_BIAS, entry, width),
                non_linearity=NON_LINEARITIES[form.non_linearity],
                reads=form.reads,
            )
        )
    return tuple(found)


def add(y: Tensor, residual: Tensor | None, network: Network) -> None:
    """Add one network's output to its rows of y ``[T, H]`` in place."""
    dispatch.count("bottleneck.add", "torch")
    tokens = network.tokens
    rows = y.index_select(0, tokens)
    read = rows
    if residual is not None and network.reads_residual:
        read = residual.index_select(0, tokens)
        if network.reads is BottleneckReads.SUM:
            read = read + rows
    with threads_for(2 * len(tokens) * network.down.numel() / PRODUCTS_PER_US):
        narrow = network.non_linearity(dense.linear(read, network.down, network.down_bias))
        y.index_copy_(0, tokens, rows + dense.linear(narrow, network.up.t(), network.up_bias))
