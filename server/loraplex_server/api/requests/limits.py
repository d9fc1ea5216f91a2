"""Limits and defaults of the model that is served."""

from __future__ import annotations

import dataclasses

from loraplex_server.core.request import SamplingDefaults
from loraplex_server.core.request_rules import RequestLimits


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds and defaults of the model that is served.

    Attributes:
        rules: those of every request.
        max_prompt_chars: a longer text cannot fit and is refused before it is tokenised.
        defaults: sampling parameters where the request gives none.
        speculative_tokens: drafted in a step for a request that does not say.
    """

    rules: RequestLimits
    max_prompt_chars: int
    defaults: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    speculative_tokens: int = 0
