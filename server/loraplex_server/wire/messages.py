"""What the API and the engine say to each other: versioned plain data in msgpack.

A connection opens with
`Hello` and is answered with `Welcome`; from then on the API sends `ToEngine` messages and the engine
sends `FromEngine` messages. Several API processes may be connected at once: every request belongs to
the connection that submitted it and dies with it.
"""

from __future__ import annotations

import msgspec

from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.composition import Composition
from loraplex_server.core.errors import ErrorInfo
from loraplex_server.core.request import FinishReason, Request, SamplingDefaults
from loraplex_server.core.tokenizer_source import TokenizerSource
from loraplex_server.wire.message import Message
from loraplex_server.wire.stats import Stats

PROTOCOL_VERSION = 1


class Hello(Message, frozen=True):
    """First frame of a client. `token` proves that it may connect."""

    version: int
    client_id: str
    token: str


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine serves; fixed for its lifetime.

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


class AdapterCommand(Message, frozen=True):
    """An adapter operation, answered by an `AdapterReply` with the same `call_id`.

    Attributes:
        op: "load", "compose", "adopt", "unload", "list", "get", "pin", "prefetch", "chat_template",
            "watch" (answered by an `AdapterChanges` with all of them, and others later) or "unwatch".
        source: for "load"; for "adopt", the folder with the files that a client sent.
        pinned: for "pin", whether to pin or to unpin.
        inplace: for "load", "compose" and "adopt", whether to replace what is registered under the name.
        composition: for "compose".
        sha256: for "adopt", of each file by name.
        grace_s: for "unload", seconds after which requests that still hold the adapter are ended.
        names: for "prefetch".
        to_device: for "prefetch", whether host memory is not enough.
    """

    call_id: int
    op: str
    name: str = ""
    source: str = ""
    pinned: bool = True
    inplace: bool = False
    grace_s: float | None = None
    names: tuple[str, ...] = ()
    to_device: bool = True
    composition: Composition | None = None
    sha256: dict[str, str] = msgspec.field(default_factory=dict)


class CheckIntegrity(Message, frozen=True):
    """Asks for the pools' state, answered by an `IntegrityReply`."""

    call_id: int


class Shutdown(Message, frozen=True):
    """Ends the engine. The API has drained its requests before."""


ToEngine = Hello | Submit | Cancel | AdapterCommand | CheckIntegrity | Shutdown


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
        drafted_tokens: guessed.
        accepted_tokens: how many of them were right.
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


class AdapterReply(Message, frozen=True):
    """Answer to an `AdapterCommand`: the adapter concerned, or all of them, or an error.

    Attributes:
        chat_template: for "chat_template", the adapter's own; "" where it has none.
    """

    call_id: int
    adapters: tuple[AdapterStatus, ...] = ()
    error: ErrorInfo | None = None
    chat_template: str = ""


class AdapterChanges(Message, frozen=True):
    """Adapters that are not as they were, sent to clients that watch.

    Attributes:
        removed: names under which there is nothing any more.
        all: `adapters` are all there are; the first such message of a client is this.
    """

    adapters: tuple[AdapterStatus, ...]
    removed: tuple[str, ...] = ()
    all: bool = False


class TokenizersChanged(Message, frozen=True):
    """Adapters that from now on bring these tokenizers, or None; sent before the reply to what changed it."""

    changed: dict[str, TokenizerSource | None]


class IntegrityReply(Message, frozen=True):
    """Pools as they are now.

    Attributes:
        problems: one line for each broken invariant; empty when all is well.
        weight_checksum: SHA-256 over the resident base weights, computed now.
    """

    call_id: int
    problems: tuple[str, ...]
    running: int
    waiting: int
    kv_blocks_used: int
    adapter_references: int
    weight_checksum: str


FromEngine = (
    Welcome | Tokens | Failed | AdapterReply | AdapterChanges | TokenizersChanged | IntegrityReply | Stats
)
