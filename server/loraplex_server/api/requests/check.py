"""Checks of generation requests on the wire; the rules of every request are those of `core.request_rules`.

Every violation of a message is found before any is reported, each under the path of its field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from loraplex.v1 import generation_pb2
from loraplex_server.api.requests import bounds, request_id
from loraplex_server.api.requests.limits import Limits
from loraplex_server.api.requests.to_core import to_adapter_uses, to_sampling
from loraplex_server.api.requests.violations import Violations
from loraplex_server.core import names
from loraplex_server.core.errors import FieldViolation
from loraplex_server.core.request_rules import (
    mix_violations,
    prompt_violations,
    repeated,
    sampling_violations,
    speculation_violations,
)

_ROLE = re.compile(r"[a-z0-9_]{1,32}")


def check_generate(message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    """Checks all that can be checked before the prompt is tokenised.

    Raises:
        InvalidArgumentError: with one violation for each bad field.
    """
    found = Violations()
    _check_prompt(found, message, limits)
    _check_adapters(found, message, limits)
    _check_sampling(found, message, limits)
    _check_stopping(found, message.stopping, limits, adapters=bool(message.adapters))
    if message.HasField("structure"):
        _check_structure(found, message.structure)
    nothing = message.stopping.HasField("max_tokens") and message.stopping.max_tokens < 1
    if nothing and not (message.HasField("prompt_logprobs") or message.echo):
        found.add("stopping.max_tokens", "has to be at least 1; 0 goes with prompt_logprobs or echo")
    for field in ("logprobs", "prompt_logprobs"):
        if message.HasField(field) and getattr(message, field) > bounds.MAX_LOGPROBS:
            found.add(field, f"{getattr(message, field)} is more than {bounds.MAX_LOGPROBS}")
    if message.HasField("n") and not 1 <= message.n <= bounds.MAX_CHOICES:
        found.add("n", f"has to be 1 to {bounds.MAX_CHOICES}")
    found.extend(speculation_violations(message.speculative_tokens))
    if message.HasField("request_id") and not request_id.is_request_id(message.request_id):
        found.add("request_id", request_id.RULE)
    found.raise_any()


def check_batch(message: generation_pb2.GenerateBatchRequest) -> None:
    """Raises: InvalidArgumentError for no request, or too many."""
    found = Violations()
    if not 1 <= len(message.requests) <= bounds.MAX_BATCH:
        found.add("requests", f"has {len(message.requests)} requests; give 1 to {bounds.MAX_BATCH}")
    found.raise_any()


def check_prompt_alone(message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    """Checks a request of which nothing but the prompt and the adapters' names is wanted.

    Raises:
        InvalidArgumentError: with one violation for each bad field.
    """
    found = Violations()
    _check_prompt(found, message, limits)
    if len(message.adapters) > limits.rules.max_adapters:
        found.add(
            "adapters", f"{len(message.adapters)} are more than the {limits.rules.max_adapters} allowed"
        )
    for index, use in enumerate(message.adapters):
        check_name(found, f"adapters[{index}]", use.adapter)
    found.raise_any()


def check_prompt_tokens(
    message: generation_pb2.GenerateRequest, token_ids: Sequence[int], limits: Limits
) -> None:
    """Checks the tokenised prompt.

    Raises:
        InvalidArgumentError: it is empty, or leaves no room for an answer.
    """
    found = Violations()
    field = message.WhichOneof("prompt") or "prompt"
    if token_ids:
        found.extend(_under(field, prompt_violations(token_ids, limits.rules)))
    else:
        found.add(field, "has no tokens; give at least one character the tokenizer knows")
    found.raise_any()


def check_name(found: Violations, field: str, name: str) -> None:
    """Adds a violation under `field` unless `name` may name an adapter."""
    if not names.is_name(name):
        found.add(field, "has to be 1 to 128 letters, digits, '.', '_' or '-', and not dots alone")


def _check_prompt(found: Violations, message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    match message.WhichOneof("prompt"):
        case "text":
            if not message.text:
                found.add("text", "is empty; give at least one character")
            elif len(message.text) > limits.max_prompt_chars:
                found.add("text", f"has {_too_many_chars(len(message.text), limits)}")
        case "token_ids":
            ids = message.token_ids.ids
            found.extend(_under("token_ids.ids", prompt_violations(ids, limits.rules)))
            _check_token_ids(found, "token_ids.ids", ids, limits, adapters=bool(message.adapters))
        case "chat":
            _check_chat(found, message.chat.messages, limits)
        case _:
            found.add("prompt", "is missing; set text, token_ids or chat")


def _check_chat(found: Violations, messages: Sequence[generation_pb2.ChatMessage], limits: Limits) -> None:
    if not messages:
        found.add("chat.messages", "is empty; give at least one message")
    elif len(messages) > bounds.MAX_CHAT_MESSAGES:
        found.add("chat.messages", f"{len(messages)} messages are more than {bounds.MAX_CHAT_MESSAGES}")
        return
    for index, message in enumerate(messages):
        if not _ROLE.fullmatch(message.role):
            found.add(f"chat.messages[{index}].role", "has to be 1 to 32 lower-case letters, digits or '_'")
    characters = sum(len(message.content) + len(message.name) for message in messages)
    if characters > limits.max_prompt_chars:
        found.add("chat.messages", f"have {_too_many_chars(characters, limits)}")


def _too_many_chars(characters: int, limits: Limits) -> str:
    return (
        f"{characters} characters; the model takes {limits.rules.max_model_len} tokens, "
        f"which is {limits.max_prompt_chars} characters at most"
    )


def _check_token_ids(
    found: Violations, field: str, ids: Sequence[int], limits: Limits, *, adapters: bool
) -> None:
    # Adapters may add tokens; the engine knows which of them do.
    if ids and not adapters and max(ids) >= limits.rules.vocab_size:
        for index, token_id in enumerate(ids):
            if token_id >= limits.rules.vocab_size:
                found.add(
                    f"{field}[{index}]", f"{token_id} is not below the vocabulary's {limits.rules.vocab_size}"
                )


def _check_adapters(found: Violations, message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    uses = to_adapter_uses(message.adapters)
    found.extend(mix_violations(uses, limits.rules))
    if len(uses) > limits.rules.max_adapters:
        return
    for index, use in enumerate(uses):
        check_name(found, f"adapters[{index}].adapter", use.name)
    for index in repeated(uses):
        found.add(f"adapters[{index}].adapter", "is named twice; add the weights up instead")


def _check_sampling(found: Violations, message: generation_pb2.GenerateRequest, limits: Limits) -> None:
    bias, field = message.sampling.logit_bias, "sampling.logit_bias"
    if len(bias) > bounds.MAX_LOGIT_BIAS:
        found.add(field, f"{len(bias)} tokens are more than {bounds.MAX_LOGIT_BIAS}")
    else:
        _check_token_ids(found, field, list(bias), limits, adapters=bool(message.adapters))
    found.extend(sampling_violations(to_sampling(message, limits)))
    _check_bad_words(found, message.sampling.bad_words)


def _under(field: str, violations: Iterable[FieldViolation]) -> Iterator[FieldViolation]:
    """Violations of a prompt under the path that it has in its message."""
    return (FieldViolation(field, violation.description) for violation in violations)


def _check_bad_words(found: Violations, words: Sequence[str]) -> None:
    if len(words) > bounds.MAX_BAD_WORDS:
        found.add("sampling.bad_words", f"{len(words)} words are more than {bounds.MAX_BAD_WORDS}")
    for index, word in enumerate(words):
        if not 1 <= len(word.strip()) <= len(word) <= bounds.MAX_BAD_WORD_CHARS:
            found.add(
                f"sampling.bad_words[{index}]", f"has to have 1 to {bounds.MAX_BAD_WORD_CHARS} characters"
            )


def _check_stopping(
    found: Violations, stopping: generation_pb2.StoppingCriteria, limits: Limits, *, adapters: bool
) -> None:
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        found.add("stopping.min_tokens", f"is more than max_tokens, {stopping.max_tokens}")
    if len(stopping.stop) > bounds.MAX_STOPS:
        found.add("stopping.stop", f"{len(stopping.stop)} strings are more than {bounds.MAX_STOPS}")
    for index, stop in enumerate(stopping.stop):
        if not 1 <= len(stop) <= bounds.MAX_STOP_CHARS:
            found.add(f"stopping.stop[{index}]", f"has to have 1 to {bounds.MAX_STOP_CHARS} characters")
    field, ids = "stopping.stop_token_ids", stopping.stop_token_ids
    if len(ids) > bounds.MAX_STOP_TOKENS:
        found.add(field, f"{len(ids)} tokens are more than {bounds.MAX_STOP_TOKENS}")
    else:
        _check_token_ids(found, field, ids, limits, adapters=adapters)


def _check_structure(found: Violations, structure: generation_pb2.Structure) -> None:
    kind = structure.WhichOneof("kind")
    match kind:
        case "json_object":
            return
        case "choice":
            field, texts = "structure.choice.texts", list(structure.choice.texts)
            if not 1 <= len(texts) <= bounds.MAX_STRUCTURE_CHOICES:
                found.add(field, f"has {len(texts)} texts; give 1 to {bounds.MAX_STRUCTURE_CHOICES}")
            elif not all(texts):
                found.add(field, "has an empty text; every one needs a character")
        case "json_schema" | "regex" | "grammar":
            field, texts = f"structure.{kind}", [getattr(structure, kind)]
            if not texts[0]:
                found.add(field, "is empty")
        case _:
            found.add("structure", "is empty; set json_schema, json_object, regex, grammar or choice")
            return
    if sum(len(text.encode()) for text in texts) > bounds.MAX_STRUCTURE_BYTES:
        found.add(field, f"has more than {bounds.MAX_STRUCTURE_BYTES} bytes")
    elif kind == "json_schema" and texts[0]:
        _check_schema(found, field, texts[0])


def _check_schema(found: Violations, field: str, text: str) -> None:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        found.add(field, f"is no JSON: {error}")
        return
    if not isinstance(schema, dict):
        found.add(field, "is no JSON object, as schemas are")
