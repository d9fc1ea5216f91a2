"""A request for one generation: plain data that crosses from the API to the engine unchanged.

The rules for its fields are in `core.request_rules`.
"""

from __future__ import annotations

import enum

import msgspec

MAX_SPECULATIVE_TOKENS = 16
"""Most draft tokens of one request in one step."""


class FinishReason(enum.StrEnum):
    """The reason why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


class AdapterUse(msgspec.Struct, frozen=True):
    """One adapter of a mix: its name, and the weight that multiplies its delta."""

    name: str
    weight: float = 1.0


class SamplingDefaults(msgspec.Struct, frozen=True):
    """Sampling parameters from the model's files, used where a request does not set its own."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class SamplingParams(msgspec.Struct, frozen=True):
    """Rules for choosing tokens and for ending the answer.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens up to this total probability, in (0, 1]
            (Holtzman et al., 2019).
        min_p: drop tokens less probable than this fraction of the most probable one, in [0, 1]; 0 keeps all.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the
            prompt or the answer contains; 1 is none (Keskar et al., 2019).
        presence_penalty: subtracted from the logit of each token that the answer contains.
        frequency_penalty: subtracted from a token's logit once per occurrence in the answer.
        logit_bias: (token id, value added to its logit) pairs, each token once.
        bad_words: token sequences that the answer must not contain.
        seed: of the random draws. It is always set: the API draws one for requests that give none.
        max_tokens: longest answer; 0 only computes the prompt.
        min_tokens: mask the tokens that end the answer until it has this many.
        stop_token_ids: tokens that end the answer, in addition to the model's end-of-sequence tokens.
        ignore_eos: the model's end-of-sequence tokens do not end the answer.
        logprobs: number of alternatives to report with each token's log-probability; None reports nothing.
        prompt_logprobs: the same for each token of the prompt after the first.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        """True if a repetition, presence or frequency penalty is set."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Structure(msgspec.Struct, frozen=True):
    """The structure that the answer must have.

    Attributes:
        kind: "json_schema", "json_object", "regex", "grammar" (Lark) or "choice".
        text: the schema, the expression or the grammar.
        choices: for "choice", the texts to choose from.
    """

    kind: str
    text: str = ""
    choices: tuple[str, ...] = ()


class Request(msgspec.Struct, frozen=True):
    """One generation.

    Attributes:
        request_id: unique among the live requests of one API process.
        prompt_token_ids: at least one.
        adapters: its mix, each adapter once: the weighted deltas are summed. Empty is the base model.
        tenant: the owner of the request; part of every KV block's key, so tenants share no prefixes.
        priority: higher goes first.
        deadline_s: Unix time, as `time.time()` gives it, after which the answer is useless.
        cache_prefix: True if the request may read and fill the prefix cache.
        group: the same name for requests of one API process that share a prompt, which is then computed once;
            "" for a single request.
        structure: the structure of the answer; None is free text.
        speculative_tokens: most draft tokens in a step; None is the server's default.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    adapters: tuple[AdapterUse, ...] = ()
    tenant: str = "default"
    priority: int = 0
    deadline_s: float | None = None
    cache_prefix: bool = True
    group: str = ""
    structure: Structure | None = None
    speculative_tokens: int | None = None
