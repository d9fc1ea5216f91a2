"""The self-check at start: two sequences in one ragged row must give the same logits as each alone.

transformers' classes were not written for ragged rows. A mask built elsewhere, positions taken from the row,
or attention that bypasses the registered function would make one request's answer depend on another's. The
check finds this before any request is served. The sequences alone run the model's own code, so the check also
finds fused kernels that compute something else.
"""

from __future__ import annotations

import numpy as np
import torch

from loraplex_kernels.attention import AttentionBatch, LayerShape
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers import attention, context
from loraplex_server.model.layers.context import StepContext
from loraplex_server.model.run.kv_cache import allocate_kv

_LENGTHS = (7, 4)
_BLOCK = 4
# Allowed difference, relative to the largest logit. bf16 products differ between numbers of rows; the errors
# that the check looks for are far larger.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@torch.inference_mode()
def check_ragged(base: BaseModel) -> tuple[LayerShape, ...]:
    """Compares two sequences in one ragged row with each of them alone, run by transformers' attention.

    Returns:
        The attention shape of each layer, in layer order.

    Raises:
        FailedPreconditionError: the logits differ, or the model fails on a ragged row.
    """
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, vocabulary, size=length) for length in _LENGTHS]
    seen: dict[int, LayerShape] = {}
    try:
        ragged = _ragged(base, prompts, seen)
        base.model.set_attn_implementation("eager")
        stock = torch.cat([_alone(base, prompt) for prompt in prompts])
    except Exception as error:
        raise FailedPreconditionError(
            f"the architecture {base.config.model_type!r} cannot be served: a ragged row fails with "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        base.model.set_attn_implementation(attention.NAME)
    difference = (ragged - stock).abs().max().item()
    scale = stock.abs().max().item()
    packed = 1e-1 if base.format.packed_int4 else 0.0
    tolerance = max(_TOLERANCE[base.format.dtype], packed)
    if not difference <= tolerance * scale:
        raise FailedPreconditionError(
            f"the architecture {base.config.model_type!r} cannot be served: sequences in one row get other "
            f"logits than alone (they differ by {difference:.3g} of {scale:.3g})"
        )
    return tuple(seen[layer] for layer in sorted(seen))


def _ragged(base: BaseModel, prompts: list[np.ndarray], seen: dict[int, LayerShape]) -> torch.Tensor:
    lengths = np.array([len(prompt) for prompt in prompts])
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tables = -(-lengths // _BLOCK)
    blocks = np.arange(tables.sum())[::-1].copy()
    block_start = np.concatenate(([0], np.cumsum(tables)))
    positions = np.concatenate([np.arange(length) for length in lengths])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    slots = blocks[block_start[owner] + positions // _BLOCK] * _BLOCK + positions % _BLOCK
    device = base.format.device
    batch = AttentionBatch.build(
        starts, lengths, block_start, blocks, slots, block_size=_BLOCK, device=device
    )
    caches = allocate_kv(base.kv_shapes, len(blocks), _BLOCK, base.format.dtype, device)
    return _logits(base, np.concatenate(prompts), positions, StepContext(batch, caches, seen=seen))


def _alone(base: BaseModel, prompt: np.ndarray) -> torch.Tensor:
    length = len(prompt)
    batch = AttentionBatch.build(
        [0, length], [length], [0, 1], [0], np.arange(length), block_size=length, device=base.format.device
    )
    return _logits(base, prompt, np.arange(length), StepContext(batch, (), unfused=True))


def _logits(base: BaseModel, tokens: np.ndarray, positions: np.ndarray, step: StepContext) -> torch.Tensor:
    device = base.format.device
    with context.running(step):
        output = base.model(
            input_ids=torch.from_numpy(tokens).to(device)[None],
            position_ids=torch.from_numpy(positions).to(device)[None],
            use_cache=False,
        )
    logits: torch.Tensor = output.logits[0]
    return logits.float()
