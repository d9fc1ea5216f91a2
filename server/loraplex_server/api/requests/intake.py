"""A generation's way in: from a message of any transport to the requests that the engine gets."""

from __future__ import annotations

import dataclasses
import itertools
import time

import msgspec

from loraplex.v1 import generation_pb2
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests.check import check_generate, check_prompt_alone, check_prompt_tokens
from loraplex_server.api.requests.deadlines import FastestAnswer
from loraplex_server.api.requests.prompts import Prompt, bad_word_tokens, read_prompt, with_text
from loraplex_server.api.requests.request_id import is_request_id
from loraplex_server.api.requests.to_core import Circumstances, to_request
from loraplex_server.api.security import authentication
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core import log
from loraplex_server.core.errors import DeadlineExceededError
from loraplex_server.core.request import Request

_MAX_SEED = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A message that may go to the engine.

    Attributes:
        requests: one for each of the `n` answers.
        tokenizer: of its text.
        arrived_s: `time.perf_counter()` of its arrival.
        stops: strings that end an answer; the engine does not know of them.
        include_stop: the one that ends it is part of it.
        echo: the prompt, where the answers begin with it.
        chat: the prompt is a conversation.
    """

    requests: tuple[Request, ...]
    tokenizer: Tokenizer
    arrived_s: float
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    echo: Prompt | None = None
    chat: bool = False


class Intake:
    """Checks, tokenises and converts messages; nothing reaches the engine from here."""

    def __init__(self, lifecycle: Lifecycle, fastest: FastestAnswer) -> None:
        self._lifecycle = lifecycle
        self._fastest = fastest
        self._serial = itertools.count(1)

    async def accept(
        self, message: generation_pb2.GenerateRequest, *, remaining_s: float | None = None
    ) -> Accepted:
        """Makes the requests of a message; here alone its tokenizer is chosen.

        Args:
            remaining_s: after so many seconds nobody wants the answer; None is no limit.

        Raises:
            InvalidArgumentError: with one violation for each bad field.
            DeadlineExceededError: it came too late, or cannot be done in time.
            ServerError: the conversation cannot be made into a prompt.
        """
        arrived_s = time.perf_counter()
        backend = self._lifecycle.backend
        if message.HasField("request_id") and is_request_id(message.request_id):
            log.request_id.set(message.request_id)
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineExceededError("the deadline had passed when the request arrived")
        deadline_s = None if remaining_s is None else time.time() + remaining_s
        check_generate(message, backend.limits)
        chosen = await backend.tokenizers.of([use.adapter for use in message.adapters])
        prompt = await read_prompt(message, chosen.tokenizer, backend.chat)
        check_prompt_tokens(message, prompt.token_ids, backend.limits)
        around = Circumstances(
            prompt_token_ids=prompt.token_ids,
            request_id=self._engine_id(),
            tenant=authentication.tenant.get(),
            deadline_s=deadline_s,
            bad_words=await bad_word_tokens(chosen.tokenizer, message.sampling.bad_words),
            end_token_ids=chosen.end_token_ids,
        )
        request = to_request(message, backend.limits, around)
        stops = tuple(message.stopping.stop)
        if remaining_s is not None:
            left_s = remaining_s - (time.perf_counter() - arrived_s)
            self._fastest.check(request, stops, left_s, backend.limits.speculative_tokens)
        return Accepted(
            requests=self._copies(request, message.n if message.HasField("n") else 1),
            tokenizer=chosen.tokenizer,
            arrived_s=arrived_s,
            stops=stops,
            include_stop=message.stopping.include_stop,
            echo=with_text(prompt, chosen.tokenizer) if message.echo else None,
            chat=message.WhichOneof("prompt") == "chat",
        )

    async def tokenize(
        self, message: generation_pb2.TokenizeRequest | generation_pb2.CountTokensRequest
    ) -> tuple[int, ...]:
        """The token ids of a prompt, however many they are.

        Raises:
            ServerError: as `accept`, of the prompt's fields.
        """
        backend = self._lifecycle.backend
        request = generation_pb2.GenerateRequest()
        match message.WhichOneof("prompt"):
            case "text":
                request.text = message.text
            case "chat":
                request.chat.CopyFrom(message.chat)
        for name in message.adapters:
            request.adapters.add(adapter=name)
        check_prompt_alone(request, backend.limits)
        chosen = await backend.tokenizers.of(list(message.adapters))
        return (await read_prompt(request, chosen.tokenizer, backend.chat)).token_ids

    def _engine_id(self) -> str:
        # A client may send one id many times; the engine needs each to be another.
        return f"{log.request_id.get()}#{next(self._serial)}"

    def _copies(self, first: Request, count: int) -> tuple[Request, ...]:
        """`first`, and others that differ in the seed. They share one computation of the prompt, which the
        first has scored, if any.
        """
        if count == 1:
            return (first,)
        requests = [msgspec.structs.replace(first, group=first.request_id)]
        for index in range(1, count):
            seed = (first.sampling.seed + index) & _MAX_SEED
            sampling = msgspec.structs.replace(first.sampling, seed=seed, prompt_logprobs=None)
            requests.append(
                msgspec.structs.replace(requests[0], request_id=self._engine_id(), sampling=sampling)
            )
        return tuple(requests)
