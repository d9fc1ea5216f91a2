"""The prompt of a request: its text, and its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from loraplex.v1 import generation_pb2
from loraplex_server.api.text.chat.prompts import ChatPrompts
from loraplex_server.api.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The text and the tokens that an answer continues; `text` is "" where the prompt came as tokens."""

    text: str
    token_ids: tuple[int, ...]


async def read_prompt(
    message: generation_pb2.GenerateRequest, tokenizer: Tokenizer, chat: ChatPrompts
) -> Prompt:
    """The tokenised prompt of a checked message.

    Raises:
        ServerError: the conversation cannot be made into a prompt.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return Prompt(message.text, await tokenizer.encode(message.text))
        case "chat":
            messages = [
                {"role": said.role, "content": said.content, **({"name": said.name} if said.name else {})}
                for said in message.chat.messages
            ]
            adapters = [use.adapter for use in message.adapters]
            text = await chat.prompt(messages, adapters, tokenizer.special_tokens)
            return Prompt(text, await tokenizer.encode(text, special=False))
        case _:
            return Prompt("", tuple(message.token_ids.ids))


async def bad_word_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word as they stand at the beginning of a text, and after a space."""
    found = {
        await tokenizer.encode(text, special=False) for word in words for text in (word, f" {word.strip()}")
    }
    return tuple(sorted(tokens for tokens in found if tokens))


def with_text(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    """The prompt as an answer echoes it: its text decoded where it came as tokens."""
    known = [token_id for token_id in prompt.token_ids if tokenizer.has_text(token_id)]
    return Prompt(prompt.text or tokenizer.decode(known), prompt.token_ids)
