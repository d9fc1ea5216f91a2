"""The messages between the API and the engine: versioned plain data in msgpack.

A connection opens with `Hello`, answered with `Welcome`. From then on the API sends `ToEngine` messages and
the engine sends `FromEngine` messages. Several API processes may be connected at once: a request belongs to
the connection that submitted it and ends with it.
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
"""Raised whenever a message changes; both ends must have the same."""


class Hello(Message, frozen=True):
    """First frame of a client. `token` proves that it may connect."""

    version: int
    client_id: str
    token: str


class EngineInfo(msgspec.Struct, frozen=True):
    """The model and the limits of an engine; fixed for its lifetime.

    Attributes:
        max_adapters_on_device: the operator's cap, 0 for none.
        adapter_slots: most adapters on the device at once, whether by cap, room or tables.
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
    """Answers `Hello`. `tokenizers`: what adapters bring, by name; later `TokenizersChanged` follow."""

    version: int
    info: EngineInfo
    tokenizers: dict[str, TokenizerSource] = msgspec.field(default_factory=dict)


# API -> engine


class Submit(Message, frozen=True):
    request: Request


class Cancel(Message, frozen=True):
    """Ends a request that the client no longer wants; nothing is answered."""

    request_id: str


class WatchAdapters(Message, frozen=True):
    """Asks for an `AdapterChanges` with all adapters now, and for one whenever some have changed."""


class UnwatchAdapters(Message, frozen=True):
    """Ends what `WatchAdapters` began."""


class Shutdown(Message, frozen=True):
    """Ends the engine. The API has drained its requests before."""


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
    """Seconds since the engine received the request.

    Attributes:
        cached_prompt_tokens: not computed, since their keys and values were in the prefix cache.
        drafted_tokens: draft tokens that were verified.
        accepted_tokens: how many of them were accepted.
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
        finish: set on the last delta of a request.
        times: set on the first delta, for clients that end at a stop string, and on the last.
        prompt_logprobs: of the prompt's tokens after the first, in order, those that became known; a delta of
            them alone has no token ids.
        stop_token: the last token id ended the generation (end of sequence or a stop token) and has
            no text.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token: bool = False
    times: Times | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Tokens(Message, frozen=True):
    """All that one step generated for one client."""

    deltas: tuple[TokenDelta, ...]


class Failed(Message, frozen=True):
    """A request ended with an error: refused, expired, or lost."""

    request_id: str
    error: ErrorInfo


class TokenizersChanged(Message, frozen=True):
    """Adapters that from now on bring these tokenizers, or None; sent before the reply to what changed it."""

    changed: dict[str, TokenizerSource | None]


FromEngine = Welcome | Tokens | Failed | Reply | AdapterChanges | TokenizersChanged | Stats
