"""From a body of `schema` to messages of `loraplex.v1`, whose validation is then that of every call."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from google.protobuf.message import Message as ProtoMessage

from loraplex.v1 import generation_pb2
from loraplex_server.api.http.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
)
from loraplex_server.api.requests.bounds import MAX_CHOICES
from loraplex_server.api.requests.limits import Limits
from loraplex_server.core import names
from loraplex_server.core.errors import InvalidArgumentError, NotFoundError
from loraplex_server.core.request import SamplingDefaults

_DEFAULT_TEMPERATURE = 1.0
# Fields that have the same name in `loraplex.v1`, by the message that has them; null leaves them unset.
_SAMPLING = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
)
_STOPPING = ("min_tokens", "stop_token_ids", "ignore_eos")
_REQUEST = ("n", "priority", "cache_prefix", "speculative_tokens")
_DEFAULT_COMPLETION_TOKENS = 16


def completion_messages(
    body: CompletionBody, base: str, limits: Limits
) -> list[generation_pb2.GenerateRequest]:
    """One message for each prompt.

    Args:
        base: name of the base model.

    Raises:
        InvalidArgumentError, NotFoundError: a field that only HTTP has is wrong.
    """
    _check_stream(body)
    prompts = _prompts(body.prompt)
    num_choices = len(prompts) * (body.n or 1)
    if num_choices > MAX_CHOICES:
        raise InvalidArgumentError.field(
            "prompt", f"{len(prompts)} prompts and n make {num_choices} answers, more than {MAX_CHOICES}"
        )
    found = []
    for prompt in prompts:
        limit = _DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        message = _message(body, base, limits.defaults, limit)
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.token_ids.SetInParent()
            message.token_ids.ids.extend(prompt)
        if body.logprobs is not None:
            message.logprobs = body.logprobs
            if body.echo:
                message.prompt_logprobs = body.logprobs
        if body.echo:
            message.echo = True
        found.append(message)
    return found


def chat_messages(body: ChatBody, base: str, limits: Limits) -> list[generation_pb2.GenerateRequest]:
    """The one message of a conversation; arguments as those of `completion_messages`.

    Raises:
        InvalidArgumentError, NotFoundError: a field that only HTTP has is wrong.
    """
    _check_stream(body)
    given = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(given) > 1:
        raise InvalidArgumentError.field("max_tokens", "differs from max_completion_tokens; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidArgumentError.field("top_logprobs", "needs logprobs to be true")
    # Without a limit an answer ends by itself, or where the context is full.
    message = _message(body, base, limits.defaults, given.pop() if given else limits.rules.max_model_len)
    for said in body.messages:
        message.chat.messages.add(role=said.role, content=_content(said), name=said.name)
    if body.logprobs:
        message.logprobs = body.top_logprobs or 0
    return [message]


def adapter_of(model: str, base: str) -> str:
    """The adapter that `model` names, "" for the base model.

    Raises:
        NotFoundError: nothing can have this name.
    """
    if model == base:
        return ""
    if not names.is_name(model):
        raise NotFoundError(
            f"there is no model {model[:200]!r}; GET /v1/models lists them", resource=("adapter", model)
        )
    return model


def _message(
    body: GenerationBody, base: str, defaults: SamplingDefaults, max_tokens: int
) -> generation_pb2.GenerateRequest:
    message = generation_pb2.GenerateRequest()
    _name_adapters(message, body, base)
    sampling, stopping = message.sampling, message.stopping
    _copy(body, message, _REQUEST)
    _copy(body, sampling, _SAMPLING)
    _copy(body, stopping, _STOPPING)
    # A model whose files say nothing is sampled at 1, as OpenAI's API has it, not greedily.
    temperature = defaults.temperature or _DEFAULT_TEMPERATURE
    sampling.temperature = temperature if body.temperature is None else body.temperature
    for token, bias in (body.logit_bias or {}).items():
        sampling.logit_bias[int(token)] = bias
    if body.seed is not None:
        sampling.seed = body.seed % (1 << 64)
    stopping.max_tokens = max_tokens
    if body.stop is not None:
        stopping.stop.extend([body.stop] if isinstance(body.stop, str) else body.stop)
    stopping.include_stop = bool(body.include_stop_str_in_output)
    _set_structure(message, body)
    return message


def _name_adapters(message: generation_pb2.GenerateRequest, body: GenerationBody, base: str) -> None:
    adapter = adapter_of(body.model, base)
    if adapter and body.adapters:
        raise InvalidArgumentError.field(
            "adapters", f"go with the base model {base!r}; {adapter!r} is an adapter, name it among them"
        )
    if adapter:
        message.adapters.add(adapter=adapter)
    for use in body.adapters or ():
        message.adapters.add(adapter=use.name, weight=use.weight)


def _copy(body: GenerationBody, message: ProtoMessage, fields: Sequence[str]) -> None:
    for field in fields:
        value = getattr(body, field)
        if isinstance(value, list):
            getattr(message, field).extend(value)
        elif value is not None:
            setattr(message, field, value)


def _set_structure(message: generation_pb2.GenerateRequest, body: GenerationBody) -> None:
    match body.response_format:
        case JsonObjectFormat():
            message.structure.json_object.SetInParent()
        case JsonSchemaFormat(named):
            message.structure.json_schema = msgspec.json.encode(named.schema).decode()
    asked = body.structure
    if asked is None:
        return
    if message.HasField("structure"):
        raise InvalidArgumentError.field("structure", "goes without response_format; give one of them")
    given = [name for name in asked.__struct_fields__ if getattr(asked, name) not in (None, False)]
    if len(given) != 1:
        raise InvalidArgumentError.field(
            "structure", "has to have one of json_schema, json_object, regex, grammar and choice"
        )
    message.structure.SetInParent()
    match given[0]:
        case "json_schema":
            message.structure.json_schema = msgspec.json.encode(asked.json_schema).decode()
        case "json_object":
            message.structure.json_object.SetInParent()
        case "choice":
            message.structure.choice.SetInParent()
            message.structure.choice.texts.extend(asked.choice or ())
        case name:
            setattr(message.structure, name, getattr(asked, name))


def _check_stream(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidArgumentError.field("stream_options", "goes with stream; leave it out")


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(entry) for entry in prompt}
    if not kinds:
        raise InvalidArgumentError.field("prompt", "is empty; give a text, token ids, or a list of either")
    if len(kinds) > 1:
        raise InvalidArgumentError.field("prompt", "mixes texts and token ids; send one kind at a time")
    if kinds == {int}:
        return [[entry for entry in prompt if isinstance(entry, int)]]
    return [entry for entry in prompt if not isinstance(entry, int)]


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)
