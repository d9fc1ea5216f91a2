"""Figures that bound a request: those of the wire, and those of the model that is served."""

from __future__ import annotations

import dataclasses

from loraplex_server.core.request import SamplingDefaults
from loraplex_server.core.request_rules import RequestLimits

# As OpenAI's API.
MAX_LOGPROBS = 20

# Bounds on what one call may cost, in memory and in time on the event loop.
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_CHAT_MESSAGES = 1024
MAX_STRUCTURE_BYTES = 256 << 10
MAX_STRUCTURE_CHOICES = 1024
MAX_PREFETCH = 1024
MAX_MEMBERS = 64
MAX_CHOICES = 128
MAX_BATCH = 1024
MAX_SOURCE_CHARS = 4096

DEFAULT_MAX_TOKENS = 256


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
