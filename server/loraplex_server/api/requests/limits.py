"""Figures that bound a request: those of the wire, and those of the model that is served."""

from __future__ import annotations

import dataclasses

from loraplex_server.core.request import SamplingDefaults

# As OpenAI's API: 20 alternatives, penalties of -2 to 2, biases of -100 to 100.
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0

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
        max_model_len: tokens of prompt and answer together.
        max_prompt_chars: a longer text cannot fit and is refused before it is tokenised.
        max_adapters: of one request.
        defaults: sampling parameters where the request gives none.
        speculative_tokens: drafted in a step for a request that does not say.
    """

    vocab_size: int
    max_model_len: int
    max_prompt_chars: int
    max_adapters: int
    defaults: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    speculative_tokens: int = 0
