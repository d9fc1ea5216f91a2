"""What a checkpoint's `generation_config.json` says about sampling."""

from __future__ import annotations

import json
import logging

import msgspec

from loraplex_server.config import ModelConfig
from loraplex_server.core.request import SamplingDefaults
from loraplex_server.model.load.checkpoint import locate

_log = logging.getLogger(__name__)


class _File(msgspec.Struct):
    """The fields that are read; a value of another type is as good as none."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def sampling_defaults(config: ModelConfig) -> SamplingDefaults:
    """Defaults for what callers leave open: the file's, or neutral ones where it is silent or not to be read.

    Only what the file says counts, not what transformers would add to it.
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
