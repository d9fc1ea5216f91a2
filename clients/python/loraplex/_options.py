"""Arguments of a generation as callers give them: prompts, conversations, adapters, options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from loraplex._structure import Structure

Prompt = str | Sequence[int]
"""Text, tokenised by the server; or token ids, taken as they are."""

ChatMessage = Mapping[str, str]
"""One message: `{"role": "user", "content": "…"}`, and a "name" where the chat template knows names."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in place of a prompt, for `map`; a chat template makes them into text.

    >>> question = Conversation([{"role": "user", "content": "Which users are there?"}])
    """

    messages: Iterable[ChatMessage]


AdapterMix = Sequence[str | tuple[str, float]] | Mapping[str, float]
"""Adapters to sum: names (weight 1), (name, weight) pairs, or a mapping of names to weights."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. The server decides what is left out or None."""

    adapter: str | None
    """One adapter, with weight 1. Neither this nor `adapters`: the base model alone."""
    adapters: AdapterMix | None
    """Several at once: `[("sql", 1.0), ("polite", 0.5)]` adds their weighted deltas to the base."""
    max_tokens: int | None
    """Most tokens to generate."""
    min_tokens: int | None
    """Fewest tokens: until then, end-of-sequence and stop tokens are masked."""
    temperature: float | None
    """0 is greedy, which is the default unless the model's generation_config.json says otherwise."""
    top_p: float | None
    """Sample from the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int | None
    """Sample from the k most probable tokens; 0 from all."""
    min_p: float | None
    """Sample from the tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float | None
    """Above 1, tokens that occur in the prompt or the answer become less likely; below 1, more likely."""
    presence_penalty: float | None
    """-2 to 2, subtracted from the logits of tokens that occur in the answer."""
    frequency_penalty: float | None
    """-2 to 2, subtracted once for each time that the token occurs in the answer."""
    logit_bias: Mapping[int, float] | None
    """Token ids, and the number added to the logit of each, -100 to 100."""
    bad_words: Sequence[str] | None
    """Texts that the answer may not contain."""
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
    """As `logprobs`, for the prompt's tokens after the first; with max_tokens=0 nothing is generated."""
    echo: bool
    """The answer begins with the prompt."""
    n: int | None
    """Number of answers; the prompt is computed once. Answer i is drawn with the seed `seed` + i."""
    priority: int | None
    """Higher goes first."""
    cache_prefix: bool | None
    """False: the request neither reads the server's prefix cache nor adds to it."""
    structure: Structure | None
    """Structured output: JsonSchema, JsonObject, Regex, Grammar or Choice."""
    speculative_tokens: int | None
    """Most draft tokens per step, 0 to 16, taken from earlier text. Faster where the answer repeats it."""
    request_id: str | None
    """A name of your own, to find the request in the server's logs."""
