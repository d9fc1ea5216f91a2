"""Between the SDK's values and the messages of loraplex.v1."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message

from loraplex._structure import Structure, structure_message
from loraplex._types import (
    AdapterChanges,
    AdapterInfo,
    AdapterState,
    FinishReason,
    Generation,
    GenerationChunk,
    ModelInfo,
    Timing,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from loraplex.errors import InternalError, InvalidRequestError
from loraplex.v1 import adapters_pb2, generation_pb2, model_pb2

Prompt = str | Sequence[int]
"""Text, tokenised by the server; or token ids, taken as they are."""

ChatMessage = Mapping[str, str]
"""What was said: `{"role": "user", "content": "…"}`, and a "name" where the chat template knows them."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in place of a prompt, for `map`; a chat template makes them into text.

    >>> question = Conversation([{"role": "user", "content": "Which users are there?"}])
    """

    messages: Iterable[ChatMessage]


AdapterMix = Sequence[str | tuple[str, float]] | Mapping[str, float]
"""Adapters to sum: names (weight 1), (name, weight) pairs, or a mapping of names to weights."""

_MESSAGE_KEYS = {"role", "content", "name"}

TokenizeT = TypeVar("TokenizeT", generation_pb2.TokenizeRequest, generation_pb2.CountTokensRequest)
MessageT = TypeVar("MessageT", bound=Message)

_FINISH_REASONS: dict[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
_ADAPTER_STATES: dict[int, AdapterState] = {
    adapters_pb2.ADAPTER_STATE_UNLOADED: AdapterState.UNLOADED,
    adapters_pb2.ADAPTER_STATE_LOADING: AdapterState.LOADING,
    adapters_pb2.ADAPTER_STATE_HOST: AdapterState.HOST,
    adapters_pb2.ADAPTER_STATE_COPYING: AdapterState.COPYING,
    adapters_pb2.ADAPTER_STATE_DEVICE: AdapterState.DEVICE,
}


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. What is left out, or None, the server decides."""

    adapter: str | None
    """One adapter, with weight 1. Neither this nor `adapters`: the base model alone."""
    adapters: AdapterMix | None
    """Several at once: `[("sql", 1.0), ("polite", 0.5)]` adds their weighted deltas to the base."""
    max_tokens: int | None
    """Most tokens to generate."""
    min_tokens: int | None
    """End-of-sequence and stop tokens are masked until there are so many."""
    temperature: float | None
    """0 is greedy, which is the default unless the model's generation_config.json says otherwise."""
    top_p: float | None
    """Sample from the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int | None
    """Sample from the k most probable tokens; 0 from all."""
    min_p: float | None
    """Sample from the tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float | None
    """Above 1: tokens that prompt or answer have become less likely; below 1, more."""
    presence_penalty: float | None
    """-2 to 2, taken from the logits of tokens that the answer has."""
    frequency_penalty: float | None
    """The same, for each time the answer has them."""
    logit_bias: Mapping[int, float] | None
    """Token ids and what is added to their logits, -100 to 100."""
    bad_words: Sequence[str] | None
    """What the answer may not contain."""
    seed: int | None
    """The same seed draws the same answer, whatever else the server is doing."""
    stop: str | Sequence[str] | None
    """End before the first of these strings."""
    include_stop: bool
    """The stop string that ended the answer is part of it."""
    stop_token_ids: Sequence[int] | None
    """End at any of these tokens."""
    ignore_eos: bool
    """End-of-sequence does not end the generation."""
    logprobs: int | None
    """0: the chosen tokens' log-probabilities; n: also those of the n most probable tokens."""
    prompt_logprobs: int | None
    """The same for the prompt's tokens after the first; with max_tokens=0 nothing is generated."""
    echo: bool
    """The answer begins with the prompt."""
    n: int | None
    """So many answers to a prompt that is computed once, drawn with the seeds from `seed` on."""
    priority: int | None
    """Higher goes first."""
    cache_prefix: bool | None
    """False: the prompt is neither taken from nor left in the server's prefix cache."""
    structure: Structure | None
    """The form of the answer: JsonSchema, JsonObject, Regex, Grammar or Choice."""
    speculative_tokens: int | None
    """Most tokens guessed in a step from earlier text, 0 to 16: sooner where it copies, not otherwise."""
    request_id: str | None
    """A name of your own, to find the request in the server's logs."""


def generate_request(
    prompt: Prompt | Conversation,
    *,
    adapter: str | None = None,
    adapters: AdapterMix | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    bad_words: Sequence[str] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    include_stop: bool = False,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    echo: bool = False,
    n: int | None = None,
    priority: int | None = None,
    cache_prefix: bool | None = None,
    structure: Structure | None = None,
    speculative_tokens: int | None = None,
    request_id: str | None = None,
) -> generation_pb2.GenerateRequest:
    """The request as sent. Only types are checked here; what the values may be, the server knows.

    Raises:
        InvalidRequestError: an argument is of the wrong type, or two exclude each other.
    """
    request = generation_pb2.GenerateRequest()
    if isinstance(prompt, (str, Conversation)):
        _assign_text(request, prompt)
    elif isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        raise InvalidRequestError.for_field(
            "prompt", f"must be text or a sequence of token ids, not {type(prompt).__name__}"
        )
    else:
        extend(request.token_ids, "ids", prompt, argument="prompt")
        request.token_ids.SetInParent()
    for name, weight in adapter_weights(adapter, adapters):
        entry = request.adapters.add()
        assign(entry, "adapter", name, argument="adapters")
        assign(entry, "weight", weight, argument="adapters")
    assign(request.sampling, "temperature", temperature)
    assign(request.sampling, "top_p", top_p)
    assign(request.sampling, "top_k", top_k)
    assign(request.sampling, "min_p", min_p)
    assign(request.sampling, "repetition_penalty", repetition_penalty)
    assign(request.sampling, "presence_penalty", presence_penalty)
    assign(request.sampling, "frequency_penalty", frequency_penalty)
    if logit_bias is not None:
        _assign_bias(request.sampling, logit_bias)
    if bad_words is not None:
        extend(request.sampling, "bad_words", bad_words)
    assign(request.sampling, "seed", seed)
    assign(request.stopping, "max_tokens", max_tokens)
    assign(request.stopping, "min_tokens", min_tokens)
    if stop is not None:
        extend(request.stopping, "stop", [stop] if isinstance(stop, str) else stop)
    assign(request.stopping, "include_stop", include_stop or None)
    if stop_token_ids is not None:
        extend(request.stopping, "stop_token_ids", stop_token_ids)
    assign(request.stopping, "ignore_eos", ignore_eos or None)
    assign(request, "logprobs", logprobs)
    assign(request, "prompt_logprobs", prompt_logprobs)
    assign(request, "echo", echo or None)
    assign(request, "n", n)
    assign(request, "priority", priority)
    assign(request, "cache_prefix", cache_prefix)
    if structure is not None:
        request.structure.CopyFrom(structure_message(structure))
    assign(request, "speculative_tokens", speculative_tokens)
    assign(request, "request_id", request_id)
    return request


def _assign_bias(sampling: generation_pb2.SamplingParams, logit_bias: Mapping[int, float]) -> None:
    if not isinstance(logit_bias, Mapping):
        raise InvalidRequestError.for_field(
            "logit_bias", f"must be a mapping of token ids, not {type(logit_bias).__name__}"
        )
    try:
        for token, bias in logit_bias.items():
            sampling.logit_bias[token] = bias
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.for_field("logit_bias", str(error)) from error


def tokenize_request(
    kind: type[TokenizeT], prompt: str | Iterable[ChatMessage], adapters: str | Sequence[str]
) -> TokenizeT:
    """A question about a prompt's tokens.

    Raises:
        InvalidRequestError: an argument is of the wrong type.
    """
    request = kind()
    _assign_text(request, prompt if isinstance(prompt, str) else Conversation(prompt))
    extend(request, "adapters", [adapters] if isinstance(adapters, str) else adapters)
    return request


def _assign_text(
    request: generation_pb2.GenerateRequest
    | generation_pb2.TokenizeRequest
    | generation_pb2.CountTokensRequest,
    prompt: str | Conversation,
) -> None:
    if isinstance(prompt, str):
        assign(request, "text", prompt, argument="prompt")
        return
    said = prompt.messages
    if isinstance(said, (str, bytes, Mapping)) or not isinstance(said, Iterable):
        raise InvalidRequestError.for_field("messages", "must be a list of mappings with role and content")
    request.chat.SetInParent()
    for entry in said:
        if not isinstance(entry, Mapping) or not {"role", "content"} <= entry.keys() <= _MESSAGE_KEYS:
            raise InvalidRequestError.for_field(
                "messages", f"each must be a mapping with role, content and perhaps name, not {entry!r}"
            )
        message = request.chat.messages.add()
        for key, value in entry.items():
            assign(message, key, value, argument="messages")


def adapter_weights(
    adapter: str | None, adapters: AdapterMix | None, *, argument: str = "adapters"
) -> list[tuple[str, float | None]]:
    """Names and weights in order; a weight of None is the server's default, 1."""
    if adapter is not None:
        if adapters is not None:
            raise InvalidRequestError.for_field(
                "adapters", "give either adapter='name' or adapters=[...], not both"
            )
        return [(adapter, None)]
    if adapters is None:
        return []
    if isinstance(adapters, (str, bytes)) or not isinstance(adapters, Iterable):
        raise InvalidRequestError.for_field(
            argument, "must be a list of names or (name, weight) pairs; for one adapter use adapter='name'"
        )
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    return [(entry, None) if isinstance(entry, str) else _pair(entry, argument) for entry in adapters]


def _pair(entry: Any, argument: str) -> tuple[str, float]:
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        return entry[0], entry[1]
    raise InvalidRequestError.for_field(
        argument, f"each entry must be a name or a (name, weight) pair, not {entry!r}"
    )


def load_request(
    name: str, source: str | os.PathLike[str], load_inplace: bool
) -> adapters_pb2.LoadAdapterRequest:
    request = named(adapters_pb2.LoadAdapterRequest, name)
    assign(request, "source", os.fspath(source) if isinstance(source, os.PathLike) else source)
    assign(request, "load_inplace", load_inplace)
    return request


def composition_request(
    name: str,
    combination_type: str,
    members: AdapterMix,
    density: float | None,
    majority_sign: str | None,
    svd_rank: int | None,
    seed: int | None,
    load_inplace: bool,
) -> adapters_pb2.RegisterCompositionRequest:
    request = named(adapters_pb2.RegisterCompositionRequest, name)
    request.combination_type = _enum_value(
        adapters_pb2.CombinationType, "combination_type", "COMBINATION_TYPE_", combination_type
    )
    for adapter, weight in adapter_weights(None, members, argument="members"):
        member = request.members.add()
        assign(member, "adapter", adapter, argument="members")
        assign(member, "weight", weight, argument="members")
    assign(request, "density", density)
    if majority_sign is not None:
        request.majority_sign = _enum_value(
            adapters_pb2.MajoritySign, "majority_sign", "MAJORITY_SIGN_", majority_sign
        )
    assign(request, "svd_rank", svd_rank)
    assign(request, "seed", seed)
    assign(request, "load_inplace", load_inplace)
    return request


def _enum_value(kind: Any, field: str, prefix: str, text: str) -> Any:
    """The number of the enum value that `text` names."""
    names = {name.removeprefix(prefix).lower(): number for name, number in kind.items() if number}
    if text not in names:
        raise InvalidRequestError.for_field(field, f"must be one of {', '.join(names)}, not {text!r}")
    return names[text]


def unload_request(name: str, grace_seconds: float | None) -> adapters_pb2.UnloadAdapterRequest:
    request = named(adapters_pb2.UnloadAdapterRequest, name)
    assign(request, "grace_seconds", grace_seconds)
    return request


def prefetch_request(names: Sequence[str], host_only: bool) -> adapters_pb2.PrefetchRequest:
    request = _of_names(adapters_pb2.PrefetchRequest, names)
    assign(request, "host_only", host_only)
    return request


def watch_request(names: Sequence[str]) -> adapters_pb2.WatchRequest:
    return _of_names(adapters_pb2.WatchRequest, names)


def _of_names(kind: type[MessageT], names: Sequence[str]) -> MessageT:
    if isinstance(names, str):
        raise InvalidRequestError.for_field("names", f"must be a list of names, not the text {names!r}")
    request = kind()
    extend(request, "names", names)
    return request


def pin_request(name: str, pinned: bool) -> adapters_pb2.PinAdapterRequest:
    request = named(adapters_pb2.PinAdapterRequest, name)
    assign(request, "pinned", pinned)
    return request


def named(kind: type[MessageT], name: str) -> MessageT:
    """A request that is about one adapter."""
    request = kind()
    assign(request, "name", name)
    return request


def assign(message: Message, field: str, value: Any, *, argument: str | None = None) -> None:
    """Sets a field, unless the value is None; a value that it cannot hold is the caller's error."""
    if value is None:
        return
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.for_field(argument or field, f"cannot be {value!r} ({error})") from error


def extend(message: Message, field: str, values: Iterable[Any], *, argument: str | None = None) -> None:
    """Like `assign`, for a repeated field."""
    try:
        getattr(message, field).extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.for_field(
            argument or field, f"has an element that does not fit ({error})"
        ) from error


class AnswerReader:
    """Reads the messages of one streamed answer, and knows whether it came to its end."""

    def __init__(self, request: generation_pb2.GenerateRequest) -> None:
        self.request_id = request.request_id
        self._unfinished = request.n if request.HasField("n") else 1
        self._logprobs = request.HasField("logprobs")
        self._prompt_logprobs = request.HasField("prompt_logprobs")
        self._echo = request.echo
        self._begun: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether every answer has come to its end."""
        return self._unfinished <= 0

    def read(self, response: generation_pb2.GenerateResponse) -> GenerationChunk:
        if response.request_id:
            self.request_id = response.request_id
        finish = response.finish if response.HasField("finish") else None
        self._unfinished -= finish is not None
        scores = self._prompt_logprobs and response.index == 0
        echoes = self._echo and response.index not in self._begun
        self._begun.add(response.index)
        return GenerationChunk(
            text=response.text,
            token_ids=list(response.token_ids),
            logprobs=[token_logprobs(entry) for entry in response.logprobs] if self._logprobs else None,
            finish_reason=finish_reason(finish.reason) if finish else None,
            usage=usage(finish.usage) if finish else None,
            timing=timing(finish.timing) if finish else None,
            stop_match=(finish.stop_match or None) if finish else None,
            request_id=self.request_id,
            index=response.index,
            prompt_logprobs=[token_logprobs(entry) for entry in response.prompt_logprobs] if scores else None,
            prompt_token_ids=list(response.prompt_token_ids) if echoes else None,
        )

    def check_complete(self) -> None:
        """Called at the end of the stream: an answer cut short must not pass for a whole one."""
        if not self.complete:
            raise InternalError(
                "the stream ended without saying how the generation finished", request_id=self.request_id
            )


class ChangesReader:
    """Reads the messages of a watch, which has no end of its own."""

    request_id = ""

    def read(self, response: adapters_pb2.WatchResponse) -> AdapterChanges:
        return adapter_changes(response)

    def check_complete(self) -> None:
        """Called when the server has ended it."""


def joined(chunks: Iterable[GenerationChunk]) -> Generation:
    """The chunks of a complete answer as one; of several answers as the first, which has the others."""
    found: dict[int, list[GenerationChunk]] = {}
    for piece in chunks:
        found.setdefault(piece.index, []).append(piece)
    answers = [_joined(found[index]) for index in sorted(found)]
    if not answers:
        raise RuntimeError("the answer has been read to its end already")
    return replace(answers[0], others=answers[1:])


def _joined(pieces: list[GenerationChunk]) -> Generation:
    last = pieces[-1]
    if last.finish_reason is None or last.usage is None or last.timing is None:
        raise RuntimeError("the answer has been read to its end already")
    scored = [entry for piece in pieces for entry in piece.prompt_logprobs or ()]
    return Generation(
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=(
            None if last.logprobs is None else [entry for piece in pieces for entry in piece.logprobs or ()]
        ),
        timing=last.timing,
        request_id=last.request_id,
        stop_match=last.stop_match,
        index=last.index,
        prompt_logprobs=None if last.prompt_logprobs is None else scored,
        prompt_token_ids=pieces[0].prompt_token_ids,
    )


def generation(
    request: generation_pb2.GenerateRequest, response: generation_pb2.GenerateUnaryResponse
) -> Generation:
    wants_logprobs = request.HasField("logprobs")
    request_id = response.request_id or request.request_id
    prompt_ids = list(response.prompt_token_ids) if request.echo else None
    return Generation(
        text=response.text,
        token_ids=list(response.token_ids),
        finish_reason=finish_reason(response.finish.reason),
        usage=usage(response.finish.usage),
        logprobs=[token_logprobs(entry) for entry in response.logprobs] if wants_logprobs else None,
        timing=timing(response.finish.timing),
        request_id=request_id,
        stop_match=response.finish.stop_match or None,
        prompt_logprobs=[token_logprobs(entry) for entry in response.prompt_logprobs]
        if request.HasField("prompt_logprobs")
        else None,
        prompt_token_ids=prompt_ids,
        others=[_other(answer, request, request_id, prompt_ids) for answer in response.others],
    )


def _other(
    answer: generation_pb2.Answer,
    request: generation_pb2.GenerateRequest,
    request_id: str,
    prompt_token_ids: list[int] | None,
) -> Generation:
    wants_logprobs = request.HasField("logprobs")
    return Generation(
        text=answer.text,
        token_ids=list(answer.token_ids),
        finish_reason=finish_reason(answer.finish.reason),
        usage=usage(answer.finish.usage),
        logprobs=[token_logprobs(entry) for entry in answer.logprobs] if wants_logprobs else None,
        timing=timing(answer.finish.timing),
        request_id=request_id,
        stop_match=answer.finish.stop_match or None,
        index=answer.index,
        prompt_token_ids=prompt_token_ids,
    )


def finish_reason(value: int) -> FinishReason:
    return _FINISH_REASONS.get(value, FinishReason.UNSPECIFIED)


def usage(message: generation_pb2.Usage) -> Usage:
    return Usage(
        message.prompt_tokens,
        message.completion_tokens,
        message.cached_prompt_tokens,
        message.drafted_tokens,
        message.accepted_tokens,
    )


def timing(message: generation_pb2.Timing) -> Timing:
    return Timing(
        queue_seconds=message.queue_seconds,
        adapter_wait_seconds=message.adapter_wait_seconds,
        time_to_first_token_seconds=message.time_to_first_token_seconds,
        total_seconds=message.total_seconds,
        preemptions=message.preemptions,
    )


def token_logprobs(message: generation_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob,
        top=[TopLogprob(top.token_id, top.logprob, top.text) for top in message.top],
    )


def adapter_info(message: adapters_pb2.Adapter) -> AdapterInfo:
    return AdapterInfo(
        name=message.name,
        source=message.source,
        state=adapter_state(message.state),
        pinned=message.pinned,
        peft_type=message.peft_type,
        rank=message.rank,
        target_modules=list(message.target_modules),
        bytes=message.bytes,
        content_hash=message.content_hash,
        references=message.references,
        draining=message.draining,
        hits=message.hits,
        misses=message.misses,
        evictions=message.evictions,
    )


def adapter_changes(message: adapters_pb2.WatchResponse) -> AdapterChanges:
    return AdapterChanges(
        adapters=[adapter_info(adapter) for adapter in message.adapters], removed=list(message.removed)
    )


def adapter_state(value: int) -> AdapterState:
    return _ADAPTER_STATES.get(value, AdapterState.UNSPECIFIED)


def model_info(message: model_pb2.Model) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        quantization=message.quantization,
        dtype=message.dtype,
        device=message.device,
        kernels=message.kernels,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        parameters=message.parameters,
        weight_bytes=message.weight_bytes,
        weight_checksum=message.weight_checksum,
        max_batch_tokens=message.max_batch_tokens,
        max_num_requests=message.max_num_requests,
        kv_block_size=message.kv_block_size,
        kv_blocks=message.kv_blocks,
        adapter_device_bytes=message.adapter_device_bytes,
        adapter_host_bytes=message.adapter_host_bytes,
        max_adapters_on_device=message.max_adapters_on_device,
        server_version=message.server_version,
    )
