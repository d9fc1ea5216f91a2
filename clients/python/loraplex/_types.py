"""The values that the SDK answers with. No protobuf type leaves the package."""

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
    """The part of the prompt that was not computed, since the server's prefix cache had it."""
    drafted_tokens: int = 0
    """Tokens that the server guessed (`speculative_tokens`), right or wrong."""
    accepted_tokens: int = 0
    """Those that it guessed right."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds as the server saw them, all from the request's arrival."""

    queue_seconds: float
    """Until first scheduled."""
    adapter_wait_seconds: float
    """The part of it spent waiting for adapters to be on the device."""
    time_to_first_token_seconds: float
    total_seconds: float
    preemptions: int
    """How often the request was put back and recomputed."""


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
    """One entry per token of the prompt after the first; of the first answer, and None unless asked for."""
    prompt_token_ids: list[int] | None = None
    """None unless the prompt is echoed."""
    others: list[Generation] = field(default_factory=list)
    """Of the first of `n` answers: the others, in order."""


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of an answer. Its last one, and only it, has `finish_reason`, `usage` and `timing`."""

    text: str
    """What became certain; may be empty while a character or a possible stop string is incomplete."""
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
    """Of the prompt's tokens after the first, those that became known; in pieces of the first answer."""
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
    """Of its weights, in host memory and on the device."""
    content_hash: str
    """SHA-256 over weights and configuration; empty until first read."""
    references: int
    """Requests that hold it now."""
    draining: bool
    """Unloaded, or replaced by a newer version of its name, and kept for those requests."""
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """What `watch` tells: in the beginning all adapters, then those that are not as they were."""

    adapters: list[AdapterInfo]
    removed: list[str]
    """Names under which there is nothing any more."""


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
