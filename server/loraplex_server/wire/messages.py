"""The messages between the API and the engine: versioned plain data in msgpack.

The API opens a connection with `Hello`, and the engine answers with `Welcome`. Then the API sends `ToEngine`
messages and the engine sends `FromEngine` messages. Several API processes may be connected at once. A request
belongs to the connection that submitted it: if the connection closes, the engine cancels the request.
"""

from __future__ import annotations

import msgspec

from loraplex_server.core.adapter_status import AdapterChanges
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import FinishReason, Request, SamplingDefaults
from loraplex_server.core.tokenizer_source import TokenizerSource
from loraplex_server.wire.commands import Call, Reply
from loraplex_server.wire.message import Message
from loraplex_server.wire.stats import Stats

PROTOCOL_VERSION = 2
"""Increased whenever a message changes; both ends must have the same version."""


class Hello(Message, frozen=True):
    """The first frame of a client; `token` is the secret that proves that it may connect."""

    version: int
    client_id: str
    token: str


class EngineInfo(msgspec.Struct, frozen=True):
    """The model and the limits of an engine, which never change while it runs.

    Attributes:
        parameters: number of parameters of the unquantised model.
        weight_bytes: bytes of the resident base weights.
        weight_checksum: SHA-256 over them, in hex, computed at the start.
        max_adapters_on_device: the operator's limit; 0 is none.
        adapter_slots: most adapters on the device at once, after all limits.
        sampling_defaults: parameters for requests that do not set their own.
        memory: name and bytes of each part of the memory plan.
    """

    model: str
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
    adapter_slots: int
    eos_token_ids: tuple[int, ...]
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    memory: tuple[tuple[str, int], ...] = ()


class Welcome(Message, frozen=True):
    """The answer to `Hello`.

    Attributes:
        tokenizers: the adapters' own tokenizers, by adapter name; `TokenizersChanged` reports later changes.
    """

    version: int
    info: EngineInfo
    tokenizers: dict[str, TokenizerSource] = msgspec.field(default_factory=dict)


# API -> engine


class Submit(Message, frozen=True):
    request: Request


class Cancel(Message, frozen=True):
    """Ends a request that the client no longer wants; the engine sends no reply."""

    request_id: str


class WatchAdapters(Message, frozen=True):
    """Asks for an `AdapterChanges` with all adapters now, and for another one after each change."""


class UnwatchAdapters(Message, frozen=True):
    """Asks for no more `AdapterChanges`."""


class Shutdown(Message, frozen=True):
    """Ends the engine. The API drains its requests first."""


ToEngine = Hello | Submit | Cancel | Call | WatchAdapters | UnwatchAdapters | Shutdown


# engine -> API


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class Times(msgspec.Struct, frozen=True):
    """Times and counts of one request. Times are in seconds since the engine received it.

    Attributes:
        queue_s: until the request was first scheduled.
        adapter_wait_s: the time in which it waited for its adapters.
        first_token_s: until its first token.
        total_s: until now.
        preemptions: number of times that it was preempted.
        cached_prompt_tokens: prompt tokens that were taken from the prefix cache instead of being computed.
        drafted_tokens: draft tokens that were verified.
        accepted_tokens: draft tokens that were accepted.
    """

    queue_s: float
    adapter_wait_s: float
    first_token_s: float
    total_s: float
    preemptions: int
    cached_prompt_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class TokenDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request.

    Attributes:
        logprobs: one entry per token id if the request asked for them.
        finish: set on the last delta of a request.
        stop_token: True if the last token id ended the generation (end of sequence or a stop token); it has
            no text.
        times: set on the first delta, for requests that the API ends at a stop string, and on the last.
        prompt_logprobs: new entries for the prompt's tokens after the first, in order. A delta may have only
            these and no token ids.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token: bool = False
    times: Times | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Tokens(Message, frozen=True):
    """The tokens that one step generated for the requests of one client."""

    deltas: tuple[TokenDelta, ...]


class Failed(Message, frozen=True):
    """A request that ended with an error."""

    request_id: str
    error: ErrorInfo


class TokenizersChanged(Message, frozen=True):
    """Changes of the adapters' own tokenizers, sent before the reply to the command that made them.

    Attributes:
        changed: by adapter name; None if the adapter has no tokenizer any more.
    """

    changed: dict[str, TokenizerSource | None]


FromEngine = Welcome | Tokens | Failed | Reply | AdapterChanges | TokenizersChanged | Stats
