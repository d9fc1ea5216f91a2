"""The memory of one step beside weights, adapters and KV cache, measured before the weights are loaded.

The model runs once on the meta device, which needs no GPU. Stand-ins replace its projections and its
attention: they allocate what the real ones allocate, and compute nothing. The peak of live bytes is the
result. This works for any architecture of transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from typing import Any, cast

import torch
from transformers import AttentionInterface

from loraplex_kernels import dispatch
from loraplex_kernels.attention import AttentionBatch, LayerShape, plan
from loraplex_kernels.attention import tiles as attention_tiles
from loraplex_kernels.lora import tiles as lora_tiles
from loraplex_kernels.pool import DECODE_ROWS, LoraBatchBuffers, LoraSite
from loraplex_kernels.quant import BLOCK
from loraplex_kernels.quant import tiles as quant_tiles
from loraplex_server.model.layers import context
from loraplex_server.model.layers.context import StepContext
from loraplex_server.model.layers.linear import FrozenHead
from loraplex_server.model.layers.weights import WeightFormat
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.load.filler import install
from loraplex_server.model.plan.live_bytes import LiveBytes
from loraplex_server.model.run.graphs import GraphLimits
from loraplex_server.model.run.scoring import PIECE_ROWS, SCORING_BYTES

_log = logging.getLogger(__name__)

_META = torch.device("meta")
_ATTENTION = "loraplex_sized"
SAMPLER_BYTES = 72
"""Most bytes of the sampler per logit: float32 scores, their int64 order, some float64 probabilities."""
# For models that cannot run on the meta device: live rows per token of the widest projection's output, and of
# the hidden state.
_WIDE_ROWS, _HIDDEN_ROWS = 3, 8
# Estimates for one recording: the attention's tables, the same per token, and a thousand nodes in the driver.
_TABLE_BYTES, _TOKEN_TABLE_BYTES, _GRAPH_BYTES = 1 << 16, 512, 2 << 20


@dataclasses.dataclass(frozen=True)
class StepSize:
    """The size of the largest step.

    Attributes:
        tokens: number of tokens to compute.
        samples: number of rows of logits to sample.
        pairs: number of (token, adapter) pairs.
        max_rank: width of the adapters' intermediate results.
        scores: number of further rows of logits to score.
    """

    tokens: int
    samples: int
    pairs: int
    max_rank: int
    scores: int = 0

    @property
    def logit_rows(self) -> int:
        return self.samples + self.scores


def step_bytes(empty: EmptyModel, size: StepSize) -> int:
    """Most bytes that are alive at once in a step of `size`, including its sampling.

    Temporaries of the torch references, which run if Triton does not, are not counted.
    """
    vocabulary: int = empty.model.get_input_embeddings().weight.shape[0]
    scoring = min(size.scores, PIECE_ROWS) * SCORING_BYTES
    sampling = size.logit_rows * empty.format.dtype.itemsize + max(size.samples * SAMPLER_BYTES, scoring)
    try:
        forward = _forward_bytes(empty, size)
    except Exception as error:
        # For example, position embeddings that read their input: meta tensors have no values.
        _log.debug("the step's memory is estimated: %s", error)
        forward = _estimate(empty, size, vocabulary)
    return max(forward, vocabulary * sampling)


def graph_bytes(empty: EmptyModel, limits: GraphLimits, max_rank: int, num_slots: int) -> int:
    """Bytes of the recordings of decode steps.

    They are the inputs, logits and tables, one memory for the activations of all recordings, and the driver's
    memory for each.

    Args:
        max_rank: largest rank of an adapter.
        num_slots: adapter slots on the device.
    """
    largest = max(limits.sizes)
    vocabulary: int = empty.model.get_input_embeddings().weight.shape[0]
    total = largest * (4 * torch.int64.itemsize + vocabulary * empty.format.dtype.itemsize)
    for size in limits.sizes:
        total += LoraBatchBuffers(
            max_tokens=size,
            max_pairs=limits.pairs(size),
            max_segments=num_slots,
            device=_META,
            fixed_grid=True,
        ).nbytes
        total += torch.int32.itemsize * limits.blocks(size) + _TABLE_BYTES + size * _TOKEN_TABLE_BYTES
        total += 2 * _GRAPH_BYTES
    return total + step_bytes(empty, StepSize(largest, 1, limits.pairs(largest), max_rank))


@torch.no_grad()
def _forward_bytes(empty: EmptyModel, size: StepSize) -> int:
    model = copy.deepcopy(empty.model).to(_META)
    AttentionInterface.register(_ATTENTION, functools.partial(_attend, empty.format))
    model.set_attn_implementation(_ATTENTION)
    first = 0
    for group in empty.grouped:
        shape = (sum(p.out_features for p in group), group[0].in_features)
        install(model, group, first, [_Sized(shape, empty.format)], None)
        first += len(group)
    head = model.get_output_embeddings()
    hidden = empty.embedding_and_head.hidden_size
    model.set_output_embeddings(
        FrozenHead(head, LoraSite(first, hidden, ((0, empty.embedding_and_head.tokens),)))
    )
    # The attention's stand-in needs no tables.
    step = StepContext(cast(AttentionBatch, None), (), effects=(_Adapters(empty.format, size),))
    bytes_ = LiveBytes()
    with bytes_, context.running(step):
        model(
            inputs_embeds=torch.empty(1, size.tokens, hidden, dtype=empty.format.dtype, device=_META),
            position_ids=torch.empty(1, size.tokens, dtype=torch.int64, device=_META),
            use_cache=False,
            logits_to_keep=torch.empty(size.logit_rows, dtype=torch.int64, device=_META),
        )
    return bytes_.peak


def _estimate(empty: EmptyModel, size: StepSize, vocabulary: int) -> int:
    itemsize = empty.format.dtype.itemsize
    widest = max(sum(p.out_features for p in group) for group in empty.grouped)
    hidden: int = empty.model.get_input_embeddings().weight.shape[-1]
    rows = size.tokens * (_WIDE_ROWS * widest + _HIDDEN_ROWS * hidden)
    intermediate = size.pairs * max(map(len, empty.grouped)) * size.max_rank * torch.float32.itemsize
    return (rows + size.logit_rows * vocabulary) * itemsize + intermediate


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        # The number that the kernels assume if there is no device: an H100's.
        return 132
    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found


def _triton(weight_format: WeightFormat) -> bool:
    return dispatch.backend(weight_format.device) == "triton"


@dataclasses.dataclass(frozen=True, eq=False)
class _Sized:
    """A frozen weight without values: its product allocates as much as the real one's."""

    shape: tuple[int, int]
    format: WeightFormat

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, (out, width) = x.shape[0], self.shape
        product = x.new_empty(rows, out)
        if self.format.quantization == "none" or not _triton(self.format):
            return product
        chosen = quant_tiles.choose(
            rows, out, -(-width // BLOCK), x.dtype, _multiprocessors(self.format.device)
        )
        if chosen.family == "library":
            # A part of the weight, dequantised.
            x.new_empty(min(out * width, max(width, quant_tiles.LIBRARY_TILE)))
        elif chosen.planes > 1:
            x.new_empty(chosen.planes, rows, out, dtype=torch.float32)
        return product

    def dequantize(self) -> torch.Tensor:
        return torch.empty(self.shape, device=_META)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


@dataclasses.dataclass(frozen=True)
class _Adapters:
    """The stand-in for adapters: it allocates as if every kind of adapter acted on every token."""

    format: WeightFormat
    size: StepSize

    def before(self, site: LoraSite, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    def after(self, site: LoraSite, x: torch.Tensor, y: torch.Tensor) -> None:
        # For an effect that scales the output: the selected rows, and their vectors.
        scratch = [torch.empty_like(y), torch.empty_like(y)]
        del scratch
        size, slices = self.size, site.num_slices
        rows = DECODE_ROWS
        config = lora_tiles.choose(rows, size.pairs, x.dtype, x.dtype, self.format.device)
        planes = lora_tiles.planes(config, -(-size.pairs // rows) * slices, site.in_features)
        x.new_empty(size.pairs, slices, planes, size.max_rank, dtype=torch.float32)


def _attend(
    weight_format: WeightFormat,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    heads, tokens, head_dim = query.shape[1:]
    out = query.new_empty(1, tokens, heads, head_dim)
    if not _triton(weight_format):
        return out, None
    shape = LayerShape(heads, key.shape[1], head_dim, query.dtype)
    device = attention_tiles.device_of(weight_format.device)
    for variant in attention_tiles.variants(head_dim, query.dtype, roomy=device.roomy):
        parts = plan.capacity(tokens, tokens, shape, variant.rows, device.programs).planes
        query.new_empty((parts, shape.num_kv_heads, variant.rows, head_dim + 2), dtype=torch.float32)
    return out, None
