"""Sampling defaults from a checkpoint's `generation_config.json`."""

from __future__ import annotations

import json
import logging

import msgspec

from loraplex_server.config import ModelConfig
from loraplex_server.core.request import SamplingDefaults, SamplingParams
from loraplex_server.core.request_rules import sampling_violations
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

    They come from the file. Parameters that the file lacks, or sets to a value that no request may have, are
    neutral (the latter is logged); all are
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
    # transformers samples at temperature 1 where the file says nothing else.
    neutral = SamplingDefaults(temperature=1.0 if found.do_sample else 0.0, top_k=max(found.top_k or 0, 0))
    given = {
        "temperature": found.temperature if found.do_sample else None,
        "top_p": found.top_p,
        "min_p": found.min_p,
        "repetition_penalty": found.repetition_penalty,
    }
    wanted = {name: value for name, value in given.items() if value is not None}
    for violation in sampling_violations(msgspec.structs.replace(SamplingParams(), **wanted)):
        name = violation.field.removeprefix("sampling.")
        _log.warning(
            "generation_config.json: %s is not used: %g %s", name, wanted.pop(name), violation.description
        )
    return msgspec.structs.replace(neutral, **wanted)
