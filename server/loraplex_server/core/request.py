"""A generation as it is asked for: plain data that crosses from the API to the engine unchanged.

The rules that every request keeps are in `core.request_rules`.
"""

from __future__ import annotations

import enum

import msgspec

MAX_SPECULATIVE_TOKENS = 16
"""Most draft tokens of one answer in one step."""


class FinishReason(enum.StrEnum):
    """The reason for which a generation ended."""

    STOP = "stop"
    LENGTH = "length"


class AdapterUse(msgspec.Struct, frozen=True):
    """One adapter of a mix by name, with the weight that its delta is multiplied by."""

    name: str
    weight: float = 1.0


class SamplingDefaults(msgspec.Struct, frozen=True):
    """Sampling parameters from the model's own files, for those that a request leaves open."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class SamplingParams(msgspec.Struct, frozen=True):
    """How tokens are chosen and when generation ends.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        top_p: in (0, 1].
        min_p: tokens less probable than this share of the most probable one are dropped; 0 keeps all.
        repetition_penalty: logits of tokens that prompt or answer have are divided by it (multiplied, where
            negative); 1 is none (Keskar et al., 2019).
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: the same, for each time it has them.
        logit_bias: (token, what is added to its logit) pairs, each token once.
        bad_words: sequences of tokens that the answer may not contain.
        seed: always set; the API draws one where the caller gave none.
        max_tokens: 0 generates nothing: the prompt alone is looked at.
        min_tokens: end tokens are masked until this many exist.
        stop_token_ids: beside the model's end-of-sequence tokens.
        logprobs: None for none, else how many alternatives beside the chosen token.
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
        """True if a penalty makes the next token depend on those before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Structure(msgspec.Struct, frozen=True):
    """The structure that an answer is held to.

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
        adapters: its mix, each adapter once; what they add is summed with their weights. Empty is the base
            model.
        tenant: whose request it is; part of every KV block key.
        priority: higher goes first.
        deadline_s: `time.time()` after which the answer is of no use.
        cache_prefix: whether it may have, and leave, keys and values in the prefix cache.
        group: name, among those of one API process, of requests with this prompt that compute it once; "" for
            a request by itself.
        structure: what the answer is held to; None is free text.
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
