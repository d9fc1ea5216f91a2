"""What the API and the engine say to each other: versioned plain data in msgpack.

A frame on the wire is a 4-byte big-endian length and that many bytes. A connection opens with
`Hello` and is answered with `Welcome`; from then on the API sends `ToEngine` messages and the engine
sends `FromEngine` messages. Several API processes may be connected at once: every request belongs to
the connection that submitted it and dies with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from loraplex_server.core.composition import Composition
from loraplex_server.core.request import FinishReason, Request, SamplingDefaults
from loraplex_server.errors import ErrorInfo

PROTOCOL_VERSION = 1


class _Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    pass


class Hello(_Message, frozen=True):
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


class TokenizerFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a tokenizer, with what tells whether it is still the same."""

    name: str
    device: int
    inode: int
    size: int
    mtime_ns: int


class TokenizerSource(msgspec.Struct, frozen=True, array_like=True):
    """The tokenizer that an adapter brings.

    Attributes:
        folder: real path of the adapter's folder.
        added_tokens: how many token ids the adapter adds to the base's vocabulary.
    """

    folder: str
    files: tuple[TokenizerFile, ...]
    added_tokens: int = 0


class Welcome(_Message, frozen=True):
    """Answers `Hello`. `tokenizers`: what adapters bring, by name; later `TokenizersChanged` follow."""

    version: int
    info: EngineInfo
    tokenizers: dict[str, TokenizerSource] = {}


# API -> engine


class Submit(_Message, frozen=True):
    request: Request


class Cancel(_Message, frozen=True):
    """Ends a request that the client no longer wants; nothing is answered."""

    request_id: str


class AdapterCommand(_Message, frozen=True):
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
    sha256: dict[str, str] = {}


class CheckIntegrity(_Message, frozen=True):
    """Asks for the pools' state, answered by an `IntegrityReply`."""

    call_id: int


class Shutdown(_Message, frozen=True):
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


class Tokens(_Message, frozen=True):
    """All that one step generated for one client."""

    deltas: tuple[TokenDelta, ...]


class Failed(_Message, frozen=True):
    """A request ended with an error: refused, expired, or lost."""

    request_id: str
    error: ErrorInfo


class AdapterStatus(msgspec.Struct, frozen=True):
    """State of one adapter; fields as in `loraplex.v1.Adapter`, `state` in lower case."""

    name: str
    source: str
    state: str
    pinned: bool
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    bytes: int
    content_hash: str
    references: int
    draining: bool
    hits: int
    misses: int
    evictions: int


class AdapterReply(_Message, frozen=True):
    """Answer to an `AdapterCommand`: the adapter concerned, or all of them, or an error.

    Attributes:
        chat_template: for "chat_template", the adapter's own; "" where it has none.
    """

    call_id: int
    adapters: tuple[AdapterStatus, ...] = ()
    error: ErrorInfo | None = None
    chat_template: str = ""


class AdapterChanges(_Message, frozen=True):
    """Adapters that are not as they were, sent to clients that watch.

    Attributes:
        removed: names under which there is nothing any more.
        all: `adapters` are all there are; the first such message of a client is this.
    """

    adapters: tuple[AdapterStatus, ...]
    removed: tuple[str, ...] = ()
    all: bool = False


class TokenizersChanged(_Message, frozen=True):
    """Adapters that from now on bring these tokenizers, or None; sent before the reply to what changed it."""

    changed: dict[str, TokenizerSource | None]


class IntegrityReply(_Message, frozen=True):
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


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One step, for metrics. Counts are of tokens unless named otherwise.

    `device_seconds` is the step's time by the device's clock, `idle_seconds` how long the device waited for
    it although there was work; None without such a clock, or where there was none. `prepare_seconds`,
    `run_seconds` and `sample_seconds` are `StepOutput`'s, `emit_seconds` is for committing and emitting.
    `decode_tokens` has `drafted_tokens` among them, of which `accepted_tokens` were guessed right.
    """

    seconds: float
    plan_seconds: float
    requests: int
    prefill_tokens: int
    decode_tokens: int
    adapters: int
    preemptions: int
    device_seconds: float | None = None
    idle_seconds: float | None = None
    prepare_seconds: float | None = None
    run_seconds: float | None = None
    sample_seconds: float | None = None
    emit_seconds: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class SwapRecord(msgspec.Struct, frozen=True, array_like=True):
    """One movement of an adapter: `kind` is "load" (disk to host), "copy" (host to device),
    "evict_device" or "evict_host"."""

    kind: str
    adapter: str
    seconds: float
    bytes: int


class Stats(_Message, frozen=True):
    """Counters and gauges since the last `Stats`, sent to every client about ten times a second.

    Attributes:
        integrity_problems: found by the last audit of the pools, which runs when the engine is idle.
        weights_ok: the base weights had their checksum in the last audit.
        audits: completed since the start.
        adapters_running: names of the adapters that running requests use, each once.
        adapters_waiting: those that waiting requests name.
        kv_blocks_cached: blocks that no request holds and a later one may find its prompt in.
        prefix_queries: prompt tokens that were looked up in the prefix cache.
        prefix_hits: how many of them were there.
        failed_steps: steps that failed, and all requests in them.
    """

    steps: tuple[StepRecord, ...]
    swaps: tuple[SwapRecord, ...]
    waiting: int
    running: int
    waiting_for_adapter: int
    kv_blocks_used: int
    kv_blocks: int
    adapter_device_bytes_used: int
    adapter_host_bytes_used: int
    adapters_on_device: tuple[str, ...]
    adapters_on_host: tuple[str, ...]
    adapter_hits: int
    adapter_misses: int
    integrity_problems: int = 0
    weights_ok: bool = True
    audits: int = 0
    adapters_running: tuple[str, ...] = ()
    adapters_waiting: tuple[str, ...] = ()
    kv_blocks_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    failed_steps: int = 0


FromEngine = (
    Welcome | Tokens | Failed | AdapterReply | AdapterChanges | TokenizersChanged | IntegrityReply | Stats
)

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One frame, its length before it."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode_to_engine(body: bytes) -> ToEngine:
    """Raises: msgspec.DecodeError for anything that is no such message."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """Raises: msgspec.DecodeError for anything that is no such message."""
    return _from_engine.decode(body)


class FrameBuffer:
    """Cuts what comes from a connection into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the frames that are complete with `data`."""
        data = self._rest + data if self._rest else data
        begin = 0
        while len(data) - begin >= 4:
            end = begin + 4 + int.from_bytes(data[begin : begin + 4], "big")
            if end > len(data):
                break
            yield data[begin + 4 : end]
            begin = end
        self._rest = data[begin:]
