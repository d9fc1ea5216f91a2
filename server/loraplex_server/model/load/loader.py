"""Loads a checkpoint tensor by tensor, so that the unquantised model never exists as a whole.

The transformers model is built with its parameters on the meta device. Tensors are read one after the other
from the mapped safetensors files and quantised at once, and every decoder projection is replaced by a
`SiteLinear`. Memory peaks at the resident model plus a few tensors.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from loraplex_server.config import ModelConfig
from loraplex_server.core.errors import FailedPreconditionError
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.load.checkpoint import Checkpoint, locate
from loraplex_server.model.load.empty_model import EmptyModel
from loraplex_server.model.load.weight_format import resolve_device, resolve_format

_log = logging.getLogger(__name__)


def prepare(config: ModelConfig) -> tuple[EmptyModel, Checkpoint]:
    """The base model that `config` names, without weights, and the checkpoint that has them.

    Raises:
        NotFoundError: there is no such model.
        FailedPreconditionError: the model cannot be served; the text says why.
        InvalidArgumentError: the configuration asks for CUDA and there is none.
    """
    folder = locate(config.model)
    device = resolve_device(config.device)
    weight_format = resolve_format(config, device)
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise FailedPreconditionError(f"the model's config.json cannot be used: {error}") from error
    checkpoint = Checkpoint(folder)
    return EmptyModel.of(hf_config, weight_format, _eos_token_ids(folder, hf_config)), checkpoint


def load(config: ModelConfig, *, progress: bool = True) -> BaseModel:
    """Loads the base model that `config` names.

    Args:
        progress: draw a progress bar on stderr.

    Raises:
        NotFoundError: there is no such model.
        FailedPreconditionError: the model cannot be served; the text says why.
        InvalidArgumentError: the configuration asks for CUDA and there is none.
    """
    empty, checkpoint = prepare(config)
    return empty.fill(checkpoint, progress=progress)


def _eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    ids = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
