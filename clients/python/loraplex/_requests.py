"""From the SDK's arguments to the messages of loraplex.v1. The server alone knows which values are valid."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from loraplex._options import AdapterMix, ChatMessage, Conversation, GenerateOptions, Prompt
from loraplex._structure import structure_message
from loraplex.errors import InvalidRequestError
from loraplex.v1 import adapters_pb2, generation_pb2

TokenizeT = TypeVar("TokenizeT", generation_pb2.TokenizeRequest, generation_pb2.CountTokensRequest)
MessageT = TypeVar("MessageT", bound=Message)

_MESSAGE_KEYS = {"role", "content", "name"}

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_STOPPING_FIELDS = ("max_tokens", "min_tokens")
_STOPPING_SWITCHES = ("include_stop", "ignore_eos")
_REQUEST_FIELDS = (
    "logprobs",
    "prompt_logprobs",
    "n",
    "priority",
    "cache_prefix",
    "speculative_tokens",
    "request_id",
)


def generate_request(
    prompt: Prompt | Conversation, options: GenerateOptions
) -> generation_pb2.GenerateRequest:
    """The request as sent. Only types are checked here; the server knows which values are valid.

    Raises:
        InvalidRequestError: an argument is of the wrong type, or two exclude each other.
        TypeError: there is no option of that name.
    """
    for name in options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {name!r}; see loraplex.GenerateOptions")
    request = generation_pb2.GenerateRequest()
    _assign_prompt(request, prompt)
    for adapter, weight in adapter_weights(options.get("adapter"), options.get("adapters")):
        entry = request.adapters.add()
        assign(entry, "adapter", adapter, argument="adapters")
        assign(entry, "weight", weight, argument="adapters")
    _assign_sampling(request, options)
    _assign_stopping(request, options)
    for name in _REQUEST_FIELDS:
        assign(request, name, options.get(name))
    assign(request, "echo", options.get("echo") or None)
    structure = options.get("structure")
    if structure is not None:
        request.structure.CopyFrom(structure_message(structure))
    return request


def _assign_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt | Conversation) -> None:
    if isinstance(prompt, (str, Conversation)):
        _assign_text(request, prompt)
    elif isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        raise InvalidRequestError.for_field(
            "prompt", f"must be text or a sequence of token ids, not {type(prompt).__name__}"
        )
    else:
        extend(request.token_ids, "ids", prompt, argument="prompt")
        request.token_ids.SetInParent()


def _assign_sampling(request: generation_pb2.GenerateRequest, options: GenerateOptions) -> None:
    for name in _SAMPLING_FIELDS:
        assign(request.sampling, name, options.get(name))
    logit_bias = options.get("logit_bias")
    if logit_bias is not None:
        _assign_bias(request.sampling, logit_bias)
    bad_words = options.get("bad_words")
    if bad_words is not None:
        extend(request.sampling, "bad_words", bad_words)


def _assign_stopping(request: generation_pb2.GenerateRequest, options: GenerateOptions) -> None:
    for name in _STOPPING_FIELDS:
        assign(request.stopping, name, options.get(name))
    for name in _STOPPING_SWITCHES:
        # False is the server's default, and is not sent.
        assign(request.stopping, name, options.get(name) or None)
    stop = options.get("stop")
    if stop is not None:
        extend(request.stopping, "stop", [stop] if isinstance(stop, str) else stop)
    stop_token_ids = options.get("stop_token_ids")
    if stop_token_ids is not None:
        extend(request.stopping, "stop_token_ids", stop_token_ids)


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
    """A request about a prompt's tokens.

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
    messages = prompt.messages
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidRequestError.for_field("messages", "must be a list of mappings with role and content")
    request.chat.SetInParent()
    for entry in messages:
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
    *,
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
    """Sets a field, unless the value is None.

    Raises:
        InvalidRequestError: the field cannot hold the value; the text names `argument`, else the field.
    """
    if value is None:
        return
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.for_field(argument or field, f"cannot be {value!r} ({error})") from error


def extend(message: Message, field: str, values: Iterable[Any], *, argument: str | None = None) -> None:
    """Like `assign`, for a repeated field.

    Raises:
        InvalidRequestError: the field cannot hold a value.
    """
    try:
        getattr(message, field).extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.for_field(
            argument or field, f"has an element that does not fit ({error})"
        ) from error
