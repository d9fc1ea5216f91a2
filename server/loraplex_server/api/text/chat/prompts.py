"""From a conversation to the text that the model continues: which template, and what can go wrong with it."""

from __future__ import annotations

import asyncio
import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loraplex_server.api.text.chat.process import OverLimitError, RendererProcess
from loraplex_server.api.text.chat.renderer import Render
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core.errors import FailedPreconditionError, InvalidArgumentError, Reason
from loraplex_server.wire.client import EngineClient
from loraplex_server.wire.commands import GetChatTemplate

_MAX_KNOWN_BAD = 256


class ChatPrompts:
    """Renders conversations for one model and its adapters.

    An adapter with a template of its own is served with that one: it was trained with it. Several adapters
    in one request have to agree.

    Args:
        max_chars: longest prompt.
    """

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, max_chars: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_chars = max_chars
        self._renderer = RendererProcess()
        # Templates that went over the limits, by digest: each costs a process and seconds, once.
        self._bad: collections.OrderedDict[bytes, None] = collections.OrderedDict()

    async def prompt(
        self,
        messages: Sequence[Mapping[str, str]],
        adapters: Iterable[str],
        special_tokens: Mapping[str, str],
    ) -> str:
        """The text of a conversation up to where the assistant speaks next, special tokens included.

        Args:
            special_tokens: by name, those of the tokenizer that the text is for.

        Raises:
            InvalidArgumentError: the template refuses the messages, or they are too long.
            FailedPreconditionError: there is no template, it is broken, or adapters have different ones.
            NotFoundError: there is no such adapter.
        """
        whose, template = await self._template(list(adapters))
        digest = hashlib.sha256(template.encode(errors="replace")).digest()
        if digest in self._bad:
            raise _over_limit(whose)
        variables = variables_of(messages, special_tokens)
        try:
            found = await self._renderer.render(Render(template, variables, self._max_chars))
        except OverLimitError as error:
            self._bad[digest] = None
            while len(self._bad) > _MAX_KNOWN_BAD:
                self._bad.popitem(last=False)
            raise _over_limit(whose) from error
        if found.refused:
            raise InvalidArgumentError.field("chat.messages", found.refused)
        if found.broken:
            raise FailedPreconditionError(
                f"the chat template of {whose} cannot render these messages ({found.broken})",
                resource=("chat_template", whose),
                reason=Reason.NO_CHAT_TEMPLATE,
            )
        return found.text

    async def close(self) -> None:
        await self._renderer.close()

    async def _template(self, adapters: list[str]) -> tuple[str, str]:
        """The owner of the template, for the text of errors, and its source."""
        found = await asyncio.gather(*(self._engine.command(GetChatTemplate(name)) for name in adapters))
        own = {source: name for name, source in zip(adapters, found, strict=True) if source}
        if len(own) > 1:
            names = " and ".join(sorted(own.values()))
            raise FailedPreconditionError(
                f"adapters {names} bring different chat templates; send the prompt as text",
                resource=("chat_template", names),
                reason=Reason.NO_CHAT_TEMPLATE,
            )
        if own:
            source, name = own.popitem()
            return f"adapter {name!r}", source
        if not self._tokenizer.chat_template:
            raise FailedPreconditionError(
                "neither the model's tokenizer nor the adapter has a chat template; add a "
                "chat_template.jinja to its folder, or send the prompt as text",
                resource=("chat_template", "model"),
                reason=Reason.NO_CHAT_TEMPLATE,
            )
        return "the model", self._tokenizer.chat_template


def variables_of(messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """The names that a template finds defined. Tools and documents are None: templates test for them."""
    return {
        **special_tokens,
        "messages": list(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }


def _over_limit(whose: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the chat template of {whose} takes more time or memory than a template may",
        resource=("chat_template", whose),
        reason=Reason.NO_CHAT_TEMPLATE,
    )
