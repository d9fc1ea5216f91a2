"""Bounds on what one message may ask for, whatever the model."""

from __future__ import annotations

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
