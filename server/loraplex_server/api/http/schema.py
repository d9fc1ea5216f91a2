"""Bodies of the HTTP API, as OpenAI's clients send and read them; the OpenAPI document is made of these.

A field that may be null means the same then as when it is missing. Fields that OpenAI's API does not have are
loraplex's own, named as in `loraplex.v1`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from loraplex_server.api.requests import bounds
from loraplex_server.core import request_rules
from loraplex_server.core.request import MAX_SPECULATIVE_TOKENS

_MAX_COUNT = (1 << 31) - 1

Text = Annotated[str, Meta(max_length=1 << 24)]
Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
Positive = Annotated[int, Meta(ge=1, le=_MAX_COUNT)]
TokenId = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
Stop = Annotated[str, Meta(min_length=1, max_length=bounds.MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-request_rules.MAX_PENALTY, le=request_rules.MAX_PENALTY)]
RepetitionPenalty = Annotated[
    float, Meta(ge=request_rules.MIN_REPETITION_PENALTY, le=request_rules.MAX_REPETITION_PENALTY)
]
Bias = Annotated[float, Meta(ge=-request_rules.MAX_BIAS, le=request_rules.MAX_BIAS)]
TokenKey = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
Name = Annotated[str, Meta(min_length=1, max_length=512)]


class AdapterWeight(Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter of the sum, with the weight of its delta."""

    name: Name
    weight: float = 1.0


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class TextFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Free text."""


class JsonObjectFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON Schema. Name and description are ignored; this server is always strict."""

    name: Text
    schema: dict[str, Any]
    description: Text | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that fits a schema."""

    json_schema: NamedSchema


class Structure(Struct, frozen=True, forbid_unknown_fields=True):
    """What the answer is held to, as in `loraplex.v1.Structure`; exactly one of these."""

    json_schema: dict[str, Any] | None = None
    json_object: bool | None = None
    regex: Text | None = None
    grammar: Text | None = None
    choice: Annotated[list[Text], Meta(max_length=bounds.MAX_STRUCTURE_CHOICES)] | None = None


class GenerationBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds of request.

    Attributes:
        model: the base model's name, or an adapter's.
        adapters: with the base model's name: adapters to sum.
        logit_bias: token ids, as text since they are an object's keys, and what is added to their logits.
        seed: any integer; negative ones count from the top of 64 bits.
        response_format: structured output as OpenAI's API has it.
        structure: structured output of every kind; not with `response_format`.
        user: accepted and ignored.
    """

    model: Name
    adapters: list[AdapterWeight] | None = None
    n: Annotated[int, Meta(ge=1, le=bounds.MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: (
        Annotated[
            float, Meta(ge=request_rules.MIN_REPETITION_PENALTY, le=request_rules.MAX_REPETITION_PENALTY)
        ]
        | None
    ) = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Meta(max_length=bounds.MAX_LOGIT_BIAS)] | None = None
    bad_words: Annotated[list[Stop], Meta(max_length=bounds.MAX_BAD_WORDS)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=bounds.MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=bounds.MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-_MAX_COUNT, le=_MAX_COUNT)] | None = None
    cache_prefix: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structure: Structure | None = None
    speculative_tokens: Annotated[int, Meta(ge=0, le=MAX_SPECULATIVE_TOKENS)] | None = None
    user: Text | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`.

    Attributes:
        prompt: a text, a list of texts, a list of token ids, or a list of such lists.
        echo: the answer begins with the prompt, which is scored like the rest where `logprobs` is set.
        logprobs: how many alternatives beside each chosen token.
        max_tokens: 0 goes with `echo`.
    """

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=bounds.MAX_LOGPROBS)] | None = None


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: Text


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Annotated[str, Meta(min_length=1, max_length=64)] | None = None


class ChatBody(GenerationBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`. `max_completion_tokens` is `max_tokens` by its newer name."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=bounds.MAX_CHAT_MESSAGES)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=bounds.MAX_LOGPROBS)] | None = None


class PromptTokensDetails(Struct, frozen=True):
    """Tokens of the prompt that the prefix cache had."""

    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    """Draft tokens that were accepted, and those rejected, which are in no other count."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionLogprobs(Struct, frozen=True):
    """One entry a token; `text_offset` counts characters from the beginning of the text. The first token of a
    prompt that is echoed has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Struct, frozen=True):
    """A whole answer, or one event of a stream; there `usage` comes last and by itself."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET


class TokenAlternative(Struct, frozen=True):
    """`bytes` is null where the token is no whole number of characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenEntry(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenAlternative]


class ChatLogprobs(Struct, frozen=True):
    content: list[TokenEntry]
    refusal: None = None


class AnswerMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    system_fingerprint: str | None = None


class Delta(Struct, frozen=True, omit_defaults=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET


class Model(Struct, frozen=True):
    """The base model, or an adapter, whose `parent` is the base model."""

    id: str
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = None
    state: str | None = None
    content_hash: str | None = None
    object: Literal["model"] = "model"


class ModelList(Struct, frozen=True):
    data: list[Model]
    object: Literal["list"] = "list"


class Health(Struct, frozen=True):
    status: Literal["serving", "not serving"]


class ErrorDetail(Struct, frozen=True):
    """`param` is the path of the first bad field; `code` is the status in lower case."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail
