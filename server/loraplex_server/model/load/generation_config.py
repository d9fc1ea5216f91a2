"""Sampling defaults from a checkpoint's `generation_config.json`."""

from __future__ import annotations

import json
import logging

import msgspec

from loraplex_server.config import ModelConfig
from loraplex_server.core.request import SamplingDefaults
from loraplex_server.model.load.checkpoint import locate

_log = logging.getLogger(__name__)


class _File(msgspec.Struct):
    """The fields that are read; a value of a wrong type makes the whole file count as absent."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def sampling_defaults(config: ModelConfig) -> SamplingDefaults:
    """The sampling parameters for requests that do not set their own.

    They come from the file. Parameters that the file lacks, or sets to an invalid value, are neutral; all are
    if the operator turned the file off (--generation-config none) or it cannot be read. The defaults that
    transformers adds to the file are not used.

    Raises:
        NotFoundError: there is no such model.
    """
    if config.generation_config == "none":
        return SamplingDefaults()
    path = locate(config.model) / "generation_config.json"
    try:
        found = msgspec.convert(json.loads(path.read_text()), _File, strict=False)
    except FileNotFoundError:
        return SamplingDefaults()
    except (OSError, ValueError, msgspec.ValidationError) as error:
        _log.warning("generation_config.json is not used: %s", error)
        return SamplingDefaults()
    neutral = SamplingDefaults()
    temperature = found.temperature if found.temperature is not None and found.temperature >= 0 else 1.0
    return SamplingDefaults(
        temperature=temperature if found.do_sample else 0.0,
        top_k=max(found.top_k or 0, 0),
        top_p=found.top_p if found.top_p is not None and 0 < found.top_p <= 1 else neutral.top_p,
        min_p=found.min_p if found.min_p is not None and 0 <= found.min_p <= 1 else neutral.min_p,
        repetition_penalty=found.repetition_penalty
        if found.repetition_penalty is not None and found.repetition_penalty > 0
        else neutral.repetition_penalty,
    )
