"""The values that the SDK returns. No protobuf type leaves the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended; equal to its text, so `finish_reason == "stop"` holds."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    """End of sequence, a stop token, or a stop string."""
    LENGTH = "length"
    """max_tokens or the model's length was reached."""


class AdapterState(StrEnum):
    """Where an adapter's weights are; equal to its text."""

    UNSPECIFIED = "unspecified"
    UNLOADED = "unloaded"
    LOADING = "loading"
    HOST = "host"
    COPYING = "copying"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. Tokens past a stop string are neither returned nor counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0
    """Prompt tokens that came from the server's prefix cache and were not computed."""
    drafted_tokens: int = 0
    """Draft tokens of speculation (`speculative_tokens`), accepted or rejected."""
    accepted_tokens: int = 0
    """Draft tokens that were accepted."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, measured by the server from the arrival of the request."""

    queue_seconds: float
    """Until the request was first scheduled."""
    adapter_wait_seconds: float
    """Of these, the seconds spent waiting for adapters to be on the device."""
    time_to_first_token_seconds: float
    total_seconds: float
    preemptions: int
    """Times that the request was preempted and recomputed."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens at a position."""

    token_id: int
    logprob: float
    text: str
    """The token decoded by itself."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's natural log-probability, and the most probable ones', best first."""

    token_id: int
    logprob: float
    top: list[TopLogprob]


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs] | None
    """One entry per token id; None unless asked for."""
    timing: Timing
    request_id: str
    stop_match: str | None
    """The stop string that ended it."""
    index: int = 0
    """Which of the `n` answers it is."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One entry per prompt token after the first; only on the first answer, and None unless asked for."""
    prompt_token_ids: list[int] | None = None
    """None unless the prompt is echoed."""
    others: list[Generation] = field(default_factory=list)
    """On the first of `n` answers, the others in order."""


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of an answer. Its last one, and only it, has `finish_reason`, `usage` and `timing`."""

    text: str
    """Text that is final; may be empty while a character or a possible stop string is incomplete."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    usage: Usage | None
    timing: Timing | None
    stop_match: str | None
    request_id: str
    index: int = 0
    """Which of the `n` answers it is a piece of; their pieces come mixed."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Newly known entries for prompt tokens after the first; in pieces of the first answer."""
    prompt_token_ids: list[int] | None = None
    """On an answer's first piece, where the prompt is echoed."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A registered adapter."""

    name: str
    source: str
    state: AdapterState
    pinned: bool
    peft_type: str
    rank: int
    """Largest over its modules."""
    target_modules: list[str]
    bytes: int
    """Size of its weights, in host memory and on the device."""
    content_hash: str
    """SHA-256 over weights and configuration; empty until first read."""
    references: int
    """Requests that use it now."""
    draining: bool
    """Unloaded or replaced, and kept only until these requests have finished."""
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """A message of `watch`: at first all adapters, then those that have changed."""

    adapters: list[AdapterInfo]
    removed: list[str]
    """Names that are no longer registered."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model and the limits of the server that holds it."""

    name: str
    architecture: str
    quantization: str
    dtype: str
    device: str
    kernels: str
    vocab_size: int
    max_model_len: int
    parameters: int
    weight_bytes: int
    weight_checksum: str
    max_batch_tokens: int
    max_num_requests: int
    kv_block_size: int
    kv_blocks: int
    adapter_device_bytes: int
    adapter_host_bytes: int
    max_adapters_on_device: int
    """0: no cap beyond the bytes."""
    server_version: str
