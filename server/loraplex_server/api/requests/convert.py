"""Between `loraplex.v1` messages and the server's own types; all validation of requests is here.

Every violation of a message is found before any is reported, each under the path of its field.
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2
from loraplex_server.api.answers.answer import End, Piece
from loraplex_server.core.adapter_files import MAX_CONFIG_BYTES, MAX_EXTRA_FILE_BYTES, TEXT_FILES
from loraplex_server.core.adapter_status import AdapterStatus
from loraplex_server.core.composition import COMBINATION_TYPES, MAJORITY_SIGNS, Composition, prunes
from loraplex_server.core.errors import FieldViolation, InvalidArgumentError
from loraplex_server.core.request import (
    MAX_SPECULATIVE_TOKENS,
    AdapterUse,
    FinishReason,
    Request,
    SamplingDefaults,
    SamplingParams,
    Structure,
)
from loraplex_server.wire.messages import EngineInfo, TokenLogprobs

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_CHAT_MESSAGES = 1024
MAX_STRUCTURE_BYTES = 256 << 10
MAX_STRUCTURE_CHOICES = 1024
MAX_PREFETCH = 1024
MAX_MEMBERS = 64
MAX_CHOICES = 128
MAX_BATCH = 1024
DEFAULT_MAX_TOKENS = 256
# A status travels in HTTP/2 trailers, which clients limit to 8 KiB.
_MAX_VIOLATIONS = 16
_MAX_SOURCE_CHARS = 4096

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_ROLE = re.compile(r"[a-z0-9_]{1,32}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server can take.

    Attributes:
        max_prompt_chars: a longer text cannot fit and is refused before it is tokenised.
        defaults: for what a caller leaves open.
        speculative_tokens: guessed in a step for a request that does not say.
    """

    vocab_size: int
    max_model_len: int
    max_prompt_chars: int
    max_adapters: int
    defaults: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    speculative_tokens: int = 0


class _Violations:
    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(FieldViolation(field, description))

    def raise_any(self) -> None:
        if self._found:
            shown = tuple(self._found[:_MAX_VIOLATIONS])
            message = "; ".join(f"{violation.field}: {violation.description}" for violation in shown)
            if len(self._found) > len(shown):
                message += f"; and {len(self._found) - len(shown)} more"
            raise InvalidArgumentError(message, violations=shown)


def valid_request_id(text: str) -> bool:
    """Whether `text` may stand in logs: 1 to 128 printable ASCII characters without spaces."""
    return _REQUEST_ID.fullmatch(text) is not None


def valid_adapter_name(name: str) -> bool:
    """Whether an adapter may have this name."""
    return _ADAPTER_NAME.fullmatch(name) is not None


def check_generate(message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    """Checks all that can be checked before the prompt is tokenised.

    Raises:
        InvalidArgumentError: with one violation for each bad field.
    """
    found = _Violations()
    _check_prompt(found, message, limits)
    _check_adapters(found, message, limits)
    adapted = bool(message.adapters)
    _check_sampling(found, message.sampling, limits, adapters=adapted)
    _check_stopping(found, message.stopping, limits, adapters=adapted)
    if message.HasField("structure"):
        _check_structure(found, message.structure)
    nothing = message.stopping.HasField("max_tokens") and message.stopping.max_tokens < 1
    if nothing and not (message.HasField("prompt_logprobs") or message.echo):
        found.add("stopping.max_tokens", "has to be at least 1; 0 goes with prompt_logprobs or echo")
    for field in ("logprobs", "prompt_logprobs"):
        if message.HasField(field) and getattr(message, field) > MAX_LOGPROBS:
            found.add(field, f"{getattr(message, field)} is more than {MAX_LOGPROBS}")
    if message.HasField("n") and not 1 <= message.n <= MAX_CHOICES:
        found.add("n", f"has to be 1 to {MAX_CHOICES}")
    if message.speculative_tokens > MAX_SPECULATIVE_TOKENS:
        found.add("speculative_tokens", f"{message.speculative_tokens} is more than {MAX_SPECULATIVE_TOKENS}")
    if message.HasField("request_id") and not valid_request_id(message.request_id):
        found.add("request_id", "has to be 1 to 128 printable ASCII characters without spaces")
    found.raise_any()


def check_batch(message: generation_pb2.GenerateBatchRequest) -> None:
    """Raises: InvalidArgumentError for no request, or too many."""
    found = _Violations()
    if not 1 <= len(message.requests) <= MAX_BATCH:
        found.add("requests", f"has {len(message.requests)} requests; give 1 to {MAX_BATCH}")
    found.raise_any()


def prompt_alone(
    message: generation_pb2.TokenizeRequest | generation_pb2.CountTokensRequest, limits: Limits
) -> generation_pb2.GenerateRequest:
    """The generation whose prompt is to be tokenised.

    Raises:
        InvalidArgumentError: with one violation for each bad field.
    """
    request = generation_pb2.GenerateRequest()
    match message.WhichOneof("prompt"):
        case "text":
            request.text = message.text
        case "chat":
            request.chat.CopyFrom(message.chat)
    found = _Violations()
    _check_prompt(found, request, limits)
    if len(message.adapters) > limits.max_adapters:
        found.add("adapters", f"{len(message.adapters)} are more than the {limits.max_adapters} allowed")
    for index, name in enumerate(message.adapters):
        _check_adapter_name(found, f"adapters[{index}]", name)
        request.adapters.add(adapter=name)
    found.raise_any()
    return request


def to_request(
    message: generation_pb2.GenerateRequest,
    prompt_token_ids: Sequence[int],
    limits: Limits,
    *,
    bad_words: tuple[tuple[int, ...], ...] = (),
    end_token_ids: tuple[int, ...] = (),
    request_id: str,
    tenant: str,
    deadline_s: float | None,
) -> Request:
    """The request that a checked message and its tokenised prompt make.

    Args:
        bad_words: the message's, tokenised.
        end_token_ids: end the answer like the model's own end-of-sequence tokens.
        tenant: who called.
        deadline_s: `time.time()` after which the answer is of no use.

    Raises:
        InvalidArgumentError: the tokenised prompt is empty or leaves no room for an answer.
    """
    found = _Violations()
    field = message.WhichOneof("prompt") or "prompt"
    if not prompt_token_ids:
        found.add(field, "has no tokens; give at least one character the tokenizer knows")
    _check_prompt_length(found, field, len(prompt_token_ids), limits)
    found.raise_any()
    sampling, stopping = message.sampling, message.stopping
    room = limits.max_model_len - len(prompt_token_ids)
    max_tokens = min(stopping.max_tokens if stopping.HasField("max_tokens") else DEFAULT_MAX_TOKENS, room)

    def given(name: str) -> Any:
        return getattr(sampling if sampling.HasField(name) else limits.defaults, name)

    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=SamplingParams(
            temperature=given("temperature"),
            # All of the vocabulary is no restriction.
            top_k=given("top_k") if given("top_k") < limits.vocab_size else 0,
            top_p=given("top_p"),
            min_p=given("min_p"),
            repetition_penalty=given("repetition_penalty"),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=tuple(sampling.logit_bias.items()),
            bad_words=bad_words,
            seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(63),
            max_tokens=max_tokens,
            min_tokens=min(stopping.min_tokens, max_tokens),
            stop_token_ids=(*stopping.stop_token_ids, *(() if stopping.ignore_eos else end_token_ids)),
            ignore_eos=stopping.ignore_eos,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        ),
        adapters=tuple(
            AdapterUse(use.adapter, use.weight if use.HasField("weight") else 1.0) for use in message.adapters
        ),
        tenant=tenant,
        priority=message.priority,
        deadline_s=deadline_s,
        cache_prefix=message.cache_prefix if message.HasField("cache_prefix") else True,
        structure=_structure(message.structure) if message.HasField("structure") else None,
        speculative_tokens=message.speculative_tokens if message.HasField("speculative_tokens") else None,
    )


def check_load_adapter(message: adapters_pb2.LoadAdapterRequest) -> None:
    """Raises: InvalidArgumentError for a bad name or source."""
    found = _Violations()
    _check_adapter_name(found, "name", message.name)
    if not message.source:
        found.add("source", "is empty; name the folder that PEFT wrote")
    elif len(message.source) > _MAX_SOURCE_CHARS or "\0" in message.source:
        found.add("source", f"is no path; it may have {_MAX_SOURCE_CHARS} characters and no NUL")
    found.raise_any()


def to_composition(message: adapters_pb2.RegisterCompositionRequest) -> Composition:
    """The composition that a request describes.

    Raises:
        InvalidArgumentError: with one violation for each bad field; a parameter that the type does not have
            is one.
    """
    found = _Violations()
    _check_adapter_name(found, "name", message.name)
    kind = _enum_text(adapters_pb2.CombinationType, message.combination_type)
    if kind not in COMBINATION_TYPES:
        found.add("combination_type", f"is none of {', '.join(COMBINATION_TYPES)}")
    if not 1 <= len(message.members) <= MAX_MEMBERS:
        found.add("members", f"has {len(message.members)} adapters; give 1 to {MAX_MEMBERS}")
    names = [member.adapter for member in message.members]
    for index, member in enumerate(message.members[:MAX_MEMBERS]):
        _check_adapter_name(found, f"members[{index}].adapter", member.adapter)
        if member.HasField("weight") and not math.isfinite(member.weight):
            found.add(f"members[{index}].weight", "has to be finite")
        if member.adapter in names[:index]:
            found.add(f"members[{index}].adapter", f"{member.adapter!r} is named twice; add its weights up")
    if prunes(kind) and not message.HasField("density"):
        found.add("density", f"is missing; {kind} keeps that part of the values")
    for field, fits, type_names in (
        ("density", prunes(kind), "ties, dare and magnitude_prune types"),
        ("svd_rank", kind.endswith("svd"), "svd types"),
        ("seed", kind.startswith("dare"), "dare types"),
    ):
        if message.HasField(field) and not fits:
            found.add(field, f"is for {type_names}, not for {kind or 'none'}")
    if message.HasField("density") and not 0 < message.density <= 1:
        found.add("density", "has to be above 0 and at most 1")
    if message.HasField("svd_rank") and message.svd_rank < 1:
        found.add("svd_rank", "has to be at least 1")
    if message.HasField("seed") and message.seed >= 1 << 63:
        found.add("seed", "has to be below 2 to the 63rd")
    sign = _enum_text(adapters_pb2.MajoritySign, message.majority_sign)
    if sign not in ("unspecified", *MAJORITY_SIGNS):
        found.add("majority_sign", f"is none of {', '.join(MAJORITY_SIGNS)}")
    elif sign != "unspecified" and "ties" not in kind:
        found.add("majority_sign", f"is for ties types, not for {kind}")
    found.raise_any()
    return Composition(
        combination_type=kind,
        members=tuple(
            AdapterUse(member.adapter, member.weight if member.HasField("weight") else 1.0)
            for member in message.members
        ),
        density=message.density if message.HasField("density") else None,
        majority_sign="total" if sign == "unspecified" else sign,
        svd_rank=message.svd_rank if message.HasField("svd_rank") else None,
        seed=message.seed,
    )


def check_upload_header(header: adapters_pb2.UploadHeader, max_bytes: int) -> None:
    """Raises: InvalidArgumentError with one violation for each bad field."""
    found = _Violations()
    _check_adapter_name(found, "header.name", header.name)
    if not 1 <= len(header.config.encode()) <= MAX_CONFIG_BYTES:
        found.add("header.config", f"has to have 1 to {MAX_CONFIG_BYTES} bytes")
    if _SHA256.fullmatch(header.sha256) is None:
        found.add("header.sha256", "has to be 64 hex digits")
    if not 1 <= header.size <= max_bytes:
        found.add(
            "header.size", f"is {header.size}; this server takes 1 to {max_bytes} bytes (--upload-max-bytes)"
        )
    names = [file.name for file in header.files]
    for index, file in enumerate(header.files):
        field = f"header.files[{index}]"
        if file.name not in TEXT_FILES or names.index(file.name) != index:
            found.add(f"{field}.name", f"has to be one of {', '.join(TEXT_FILES)}, each once")
        if _SHA256.fullmatch(file.sha256) is None:
            found.add(f"{field}.sha256", "has to be 64 hex digits")
        if not 1 <= file.size <= MAX_EXTRA_FILE_BYTES:
            found.add(f"{field}.size", f"is {file.size}; one has 1 to {MAX_EXTRA_FILE_BYTES} bytes")
    if header.files and header.size + sum(file.size for file in header.files) > max_bytes:
        found.add("header.files", f"are with the weights more than {max_bytes} bytes (--upload-max-bytes)")
    found.raise_any()


def unload_grace_s(message: adapters_pb2.UnloadAdapterRequest) -> float | None:
    """Seconds that running requests have; None is as long as they take.

    Raises:
        InvalidArgumentError: a bad name, or no such time.
    """
    found = _Violations()
    _check_adapter_name(found, "name", message.name)
    grace_s = message.grace_seconds if message.HasField("grace_seconds") else None
    if grace_s is not None and not 0 <= grace_s < math.inf:
        found.add("grace_seconds", "has to be 0 or more, and finite")
    found.raise_any()
    return grace_s


def check_watch(message: adapters_pb2.WatchRequest) -> None:
    """Raises: InvalidArgumentError for bad names."""
    found = _Violations()
    for index, name in enumerate(message.names):
        _check_adapter_name(found, f"names[{index}]", name)
    found.raise_any()


def check_prefetch(message: adapters_pb2.PrefetchRequest) -> None:
    """Raises: InvalidArgumentError for bad names, none, or too many."""
    found = _Violations()
    if not 1 <= len(message.names) <= MAX_PREFETCH:
        found.add("names", f"has {len(message.names)} names; give 1 to {MAX_PREFETCH}")
    for index, name in enumerate(message.names[:MAX_PREFETCH]):
        _check_adapter_name(found, f"names[{index}]", name)
    found.raise_any()


def check_adapter_name(name: str) -> None:
    """Raises: InvalidArgumentError for a bad `name`."""
    found = _Violations()
    _check_adapter_name(found, "name", name)
    found.raise_any()


def to_generate_response(
    piece: Piece,
    finish: generation_pb2.Finish | None,
    token_text: Callable[[int], str],
    request_id: str,
    index: int = 0,
) -> generation_pb2.GenerateResponse:
    """One streamed message of answer `index`; `request_id` is empty on all but the first."""
    message = generation_pb2.GenerateResponse(text=piece.text, token_ids=piece.token_ids)
    # Most messages have none of these, and naming them costs as much as what they do have.
    if index:
        message.index = index
    if piece.prompt is not None:
        message.text = piece.prompt.text + piece.text
        message.prompt_token_ids.extend(piece.prompt.token_ids)
    if piece.prompt_logprobs:
        message.prompt_logprobs.extend(to_logprobs(entry, token_text) for entry in piece.prompt_logprobs)
    if piece.logprobs:
        message.logprobs.extend(to_logprobs(entry, token_text) for entry in piece.logprobs)
    if finish is not None:
        message.finish.CopyFrom(finish)
    if request_id:
        message.request_id = request_id
    return message


class WholeResponse:
    """The messages of a stream, joined."""

    def __init__(self) -> None:
        self._first = generation_pb2.GenerateUnaryResponse()
        self._others: dict[int, generation_pb2.Answer] = {}
        self._texts: defaultdict[int, list[str]] = defaultdict(list)

    def add(self, message: generation_pb2.GenerateResponse) -> None:
        """Takes the next message in."""
        part: generation_pb2.GenerateUnaryResponse | generation_pb2.Answer = self._first
        if message.index:
            part = self._others.setdefault(message.index, generation_pb2.Answer(index=message.index))
        else:
            self._first.prompt_token_ids.extend(message.prompt_token_ids)
        self._texts[message.index].append(message.text)
        part.token_ids.extend(message.token_ids)
        part.logprobs.extend(message.logprobs)
        self._first.prompt_logprobs.extend(message.prompt_logprobs)
        if message.request_id:
            self._first.request_id = message.request_id
        if message.HasField("finish"):
            part.finish.CopyFrom(message.finish)

    def response(self) -> generation_pb2.GenerateUnaryResponse:
        """All of them in one."""
        self._first.text = "".join(self._texts[0])
        for index, answer in sorted(self._others.items()):
            answer.text = "".join(self._texts[index])
            self._first.others.append(answer)
        return self._first


def to_finish(end: End) -> generation_pb2.Finish:
    """The end of an answer."""
    times = end.finish.times
    return generation_pb2.Finish(
        reason=_FINISH_REASONS[end.finish.reason],
        usage=generation_pb2.Usage(
            prompt_tokens=end.prompt_tokens,
            completion_tokens=end.completion_tokens,
            cached_prompt_tokens=times.cached_prompt_tokens if times else 0,
            drafted_tokens=times.drafted_tokens if times else 0,
            accepted_tokens=times.accepted_tokens if times else 0,
        ),
        timing=generation_pb2.Timing(
            queue_seconds=times.queue_s if times else 0.0,
            adapter_wait_seconds=times.adapter_wait_s if times else 0.0,
            time_to_first_token_seconds=end.first_token_s,
            total_seconds=end.total_s,
            preemptions=times.preemptions if times else 0,
        ),
        stop_match=end.finish.stop_match,
    )


def to_logprobs(entry: TokenLogprobs, token_text: Callable[[int], str]) -> generation_pb2.TokenLogprobs:
    return generation_pb2.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top=[
            generation_pb2.TopLogprob(
                token_id=top.token_id, logprob=top.logprob, text=token_text(top.token_id)
            )
            for top in entry.top
        ],
    )


def to_adapter(status: AdapterStatus) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=status.name,
        source=status.source,
        state=f"ADAPTER_STATE_{status.state.upper()}",
        pinned=status.pinned,
        peft_type=status.peft_type,
        rank=status.rank,
        target_modules=status.target_modules,
        bytes=status.bytes,
        content_hash=status.content_hash,
        references=status.references,
        draining=status.draining,
        hits=status.hits,
        misses=status.misses,
        evictions=status.evictions,
    )


def to_model(info: EngineInfo, server_version: str) -> model_pb2.Model:
    return model_pb2.Model(
        name=info.model,
        architecture=info.architecture,
        quantization=info.quantization,
        dtype=info.dtype,
        device=info.device,
        kernels=info.kernels,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        parameters=info.parameters,
        weight_bytes=info.weight_bytes,
        weight_checksum=info.weight_checksum,
        max_batch_tokens=info.max_batch_tokens,
        max_num_requests=info.max_num_requests,
        kv_block_size=info.kv_block_size,
        kv_blocks=info.kv_blocks,
        adapter_device_bytes=info.adapter_device_bytes,
        adapter_host_bytes=info.adapter_host_bytes,
        max_adapters_on_device=info.max_adapters_on_device,
        server_version=server_version,
    )


def _check_prompt(found: _Violations, message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    match message.WhichOneof("prompt"):
        case "text":
            if not message.text:
                found.add("text", "is empty; give at least one character")
            elif len(message.text) > limits.max_prompt_chars:
                found.add(
                    "text",
                    f"has {len(message.text)} characters; the model takes {limits.max_model_len} tokens, "
                    f"which is {limits.max_prompt_chars} characters at most",
                )
        case "token_ids":
            ids = message.token_ids.ids
            if not ids:
                found.add("token_ids.ids", "is empty; give at least one token")
            _check_prompt_length(found, "token_ids.ids", len(ids), limits)
            _check_token_ids(found, "token_ids.ids", ids, limits, adapters=bool(message.adapters))
        case "chat":
            _check_chat(found, message.chat.messages, limits)
        case _:
            found.add("prompt", "is missing; set text, token_ids or chat")


def _check_chat(found: _Violations, messages: Sequence[generation_pb2.ChatMessage], limits: Limits) -> None:
    if not messages:
        found.add("chat.messages", "is empty; give at least one message")
    elif len(messages) > MAX_CHAT_MESSAGES:
        found.add("chat.messages", f"{len(messages)} messages are more than {MAX_CHAT_MESSAGES}")
        return
    for index, message in enumerate(messages):
        if not _ROLE.fullmatch(message.role):
            found.add(f"chat.messages[{index}].role", "has to be 1 to 32 lower-case letters, digits or '_'")
    characters = sum(len(message.content) + len(message.name) for message in messages)
    if characters > limits.max_prompt_chars:
        found.add(
            "chat.messages",
            f"have {characters} characters; the model takes {limits.max_model_len} tokens, "
            f"which is {limits.max_prompt_chars} characters at most",
        )


def _check_prompt_length(found: _Violations, field: str, num_tokens: int, limits: Limits) -> None:
    if num_tokens >= limits.max_model_len:
        found.add(
            field,
            f"has {num_tokens} tokens, which leaves no room to generate: prompt and answer together "
            f"may have {limits.max_model_len}",
        )


def _check_token_ids(
    found: _Violations,
    field: str,
    ids: Sequence[int],
    limits: Limits,
    *,
    adapters: bool,
) -> None:
    # Adapters may add tokens; the engine knows which of them do.
    if ids and not adapters and max(ids) >= limits.vocab_size:
        for index, token_id in enumerate(ids):
            if token_id >= limits.vocab_size:
                found.add(
                    f"{field}[{index}]", f"{token_id} is not below the vocabulary's {limits.vocab_size}"
                )


def _check_adapter_name(found: _Violations, field: str, name: str) -> None:
    if not valid_adapter_name(name):
        found.add(field, "has to be 1 to 128 letters, digits, '.', '_' or '-'")


def _check_adapters(found: _Violations, message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    if len(message.adapters) > limits.max_adapters:
        found.add(
            "adapters", f"{len(message.adapters)} are more than the {limits.max_adapters} a request may name"
        )
        return
    names = set()
    for index, use in enumerate(message.adapters):
        _check_adapter_name(found, f"adapters[{index}].adapter", use.adapter)
        if use.adapter in names:
            found.add(f"adapters[{index}].adapter", "is named twice; add the weights up instead")
        names.add(use.adapter)
        if use.HasField("weight") and not math.isfinite(use.weight):
            found.add(f"adapters[{index}].weight", "has to be finite")


def _check_sampling(
    found: _Violations, sampling: generation_pb2.SamplingParams, limits: Limits, *, adapters: bool
) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        found.add("sampling.temperature", "has to be 0 (greedy) or more, and finite")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        found.add("sampling.top_p", "has to be above 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        found.add("sampling.min_p", "has to be 0 to 1")
    penalty = sampling.repetition_penalty
    # A float32 of 0.01 is a little less.
    least, most = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    if sampling.HasField("repetition_penalty") and not least * (1 - 1e-6) <= penalty <= most:
        found.add("sampling.repetition_penalty", f"has to be from {least:g} to {most:g}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -MAX_PENALTY <= getattr(sampling, name) <= MAX_PENALTY:
            found.add(f"sampling.{name}", f"has to be {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        found.add("sampling.logit_bias", f"{len(sampling.logit_bias)} tokens are more than {MAX_LOGIT_BIAS}")
    else:
        _check_token_ids(found, "sampling.logit_bias", list(sampling.logit_bias), limits, adapters=adapters)
        if not all(-MAX_BIAS <= value <= MAX_BIAS for value in sampling.logit_bias.values()):
            found.add("sampling.logit_bias", f"values have to be {-MAX_BIAS:g} to {MAX_BIAS:g}")
    if len(sampling.bad_words) > MAX_BAD_WORDS:
        found.add("sampling.bad_words", f"{len(sampling.bad_words)} words are more than {MAX_BAD_WORDS}")
    for index, word in enumerate(sampling.bad_words):
        if not 1 <= len(word.strip()) <= len(word) <= MAX_BAD_WORD_CHARS:
            found.add(f"sampling.bad_words[{index}]", f"has to have 1 to {MAX_BAD_WORD_CHARS} characters")


def _check_stopping(
    found: _Violations, stopping: generation_pb2.StoppingCriteria, limits: Limits, *, adapters: bool
) -> None:
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        found.add("stopping.min_tokens", f"is more than max_tokens, {stopping.max_tokens}")
    if len(stopping.stop) > MAX_STOPS:
        found.add("stopping.stop", f"{len(stopping.stop)} strings are more than {MAX_STOPS}")
    for index, stop in enumerate(stopping.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            found.add(f"stopping.stop[{index}]", f"has to have 1 to {MAX_STOP_CHARS} characters")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        found.add(
            "stopping.stop_token_ids",
            f"{len(stopping.stop_token_ids)} tokens are more than {MAX_STOP_TOKENS}",
        )
    else:
        _check_token_ids(found, "stopping.stop_token_ids", stopping.stop_token_ids, limits, adapters=adapters)


def _check_structure(found: _Violations, structure: generation_pb2.Structure) -> None:
    kind = structure.WhichOneof("kind")
    match kind:
        case "json_object":
            return
        case "choice":
            field, texts = "structure.choice.texts", list(structure.choice.texts)
            if not 1 <= len(texts) <= MAX_STRUCTURE_CHOICES:
                found.add(field, f"has {len(texts)} texts; give 1 to {MAX_STRUCTURE_CHOICES}")
            elif not all(texts):
                found.add(field, "has an empty text; every one needs a character")
        case "json_schema" | "regex" | "grammar":
            field, texts = f"structure.{kind}", [getattr(structure, kind)]
            if not texts[0]:
                found.add(field, "is empty")
        case _:
            found.add("structure", "is empty; set json_schema, json_object, regex, grammar or choice")
            return
    if sum(len(text.encode()) for text in texts) > MAX_STRUCTURE_BYTES:
        found.add(field, f"has more than {MAX_STRUCTURE_BYTES} bytes")
    elif kind == "json_schema" and texts[0]:
        try:
            schema = msgspec.json.decode(texts[0])
        except (msgspec.DecodeError, RecursionError) as error:
            found.add(field, f"is no JSON: {error}")
        else:
            if not isinstance(schema, dict):
                found.add(field, "is no JSON object, as schemas are")


def _structure(structure: generation_pb2.Structure) -> Structure:
    kind = structure.WhichOneof("kind") or ""
    if kind == "choice":
        return Structure(kind, choices=tuple(dict.fromkeys(structure.choice.texts)))
    return Structure(kind, "" if kind == "json_object" else getattr(structure, kind))


def _enum_text(kind: Any, number: int) -> str:
    """The last part of an enum value's name in lower case; "" for one that this server does not know."""
    if number not in kind.values():
        return ""
    prefix = "".join(f"_{char}" if char.isupper() else char for char in kind.DESCRIPTOR.name)
    return str(kind.Name(number)).removeprefix(f"{prefix.removeprefix('_').upper()}_").lower()
