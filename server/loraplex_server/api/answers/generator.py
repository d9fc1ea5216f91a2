"""A generation from a validated message to the pieces of its answer, the same for every way of calling."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable

import msgspec

from loraplex.v1 import generation_pb2
from loraplex_server.api.answers.answer import Answer, End, Piece, Prompt
from loraplex_server.api.lifecycle import Backend, Lifecycle
from loraplex_server.api.requests import convert
from loraplex_server.api.requests.deadlines import FastestAnswer, certain_tokens
from loraplex_server.api.security import authentication
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import Generated, Tracing
from loraplex_server.api.text.tokenizer import Tokenizer
from loraplex_server.core import log
from loraplex_server.core.errors import DeadlineExceededError, InternalError, Reason, ServerError
from loraplex_server.core.request import Request
from loraplex_server.wire.messages import Times

_MAX_SEED = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A request that may go to the engine.

    Attributes:
        stops: strings that end the answer; the engine does not know of them.
        arrived_s: `time.perf_counter()` of its arrival.
        tokenizer: of its text.
        include_stop: the one that ends it is part of it.
        echo: the prompt, where the answer begins with it.
        chat: the prompt is a conversation.
    """

    request: Request
    stops: tuple[str, ...]
    arrived_s: float
    tokenizer: Tokenizer
    include_stop: bool = False
    echo: Prompt | None = None
    chat: bool = False


class Generator:
    """Takes requests in and runs them on the engine."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, tracing: Tracing) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tracing = tracing
        self._serial = itertools.count(1)
        self._fastest = FastestAnswer()

    @property
    def backend(self) -> Backend:
        """Raises: UnavailableError before the engine is ready."""
        return self._lifecycle.backend

    async def accept(
        self, message: generation_pb2.GenerateRequest, *, remaining_s: float | None = None
    ) -> list[Accepted]:
        """Validates and tokenises; nothing has reached the engine yet. One for each of the `n` answers.

        Args:
            remaining_s: after so many seconds nobody wants the answer; None is no limit.

        Raises:
            InvalidArgumentError: with one violation for each bad field.
            DeadlineExceededError: it came too late, or cannot be done in time.
            ServerError: the conversation cannot be made into a prompt.
        """
        arrived_s = time.perf_counter()
        backend = self.backend
        if message.HasField("request_id") and convert.valid_request_id(message.request_id):
            log.request_id.set(message.request_id)
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineExceededError("the deadline had passed when the request arrived")
        deadline_s = None if remaining_s is None else time.time() + remaining_s
        convert.check_generate(message, backend.limits)
        chosen = await backend.tokenizers.of([use.adapter for use in message.adapters])
        tokenizer = chosen.tokenizer
        prompt = await _tokenise(backend, tokenizer, message)
        first = convert.to_request(
            message,
            prompt.token_ids,
            backend.limits,
            bad_words=await _bad_words(tokenizer, message.sampling.bad_words),
            end_token_ids=chosen.end_token_ids,
            request_id=self._engine_id(),
            tenant=authentication.tenant.get(),
            deadline_s=deadline_s,
        )
        self._refuse_in_vain(first, message.stopping.stop, remaining_s, arrived_s)
        stops, included = tuple(message.stopping.stop), message.stopping.include_stop
        echo = _echo(tokenizer, prompt) if message.echo else None
        chat = message.WhichOneof("prompt") == "chat"
        return [
            Accepted(request, stops, arrived_s, tokenizer, included, echo, chat)
            for request in self._requests(first, message.n if message.HasField("n") else 1)
        ]

    async def tokenize(
        self, message: generation_pb2.TokenizeRequest | generation_pb2.CountTokensRequest
    ) -> tuple[int, ...]:
        """The token ids of a prompt, however many they are.

        Raises:
            ServerError: as `accept`, of the prompt's fields.
        """
        backend = self.backend
        prompt = convert.prompt_alone(message, backend.limits)
        chosen = await backend.tokenizers.of([use.adapter for use in prompt.adapters])
        return (await _tokenise(backend, chosen.tokenizer, prompt)).token_ids

    async def run(
        self, accepted: Accepted, why_left: Callable[[], str]
    ) -> AsyncGenerator[tuple[Piece, End | None]]:
        """The answer's pieces, the last one with its end. Leaving early ends the request in the engine.

        Args:
            why_left: names the outcome, for the metrics, when the caller did not stay to the end.

        Raises:
            ServerError: any of its kinds, as the engine gave it.
        """
        request = accepted.request
        backend = self.backend
        answer = Answer(
            accepted.tokenizer,
            request.prompt_token_ids,
            accepted.stops,
            include_stop=accepted.include_stop,
        )
        outcome: str | None = None
        times: Times | None = None
        so_far: Times | None = None
        first_token_s: float | None = None
        echo = accepted.echo
        waited_s = time.perf_counter() - accepted.arrived_s
        span = self._tracing.generation(
            request, chat=accepted.chat, request_id=log.request_id.get(), seconds=waited_s
        )
        deltas = backend.engine.stream(request)
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    if delta.token_ids and first_token_s is None:
                        first_token_s, so_far = time.perf_counter() - accepted.arrived_s, delta.times
                        self._metrics.observe_first_token(first_token_s)
                    piece = answer.push(delta)
                    if piece.empty:
                        continue
                    if echo is not None:
                        piece, echo = msgspec.structs.replace(piece, prompt=echo), None
                    if piece.finish is None:
                        yield piece, None
                        continue
                    outcome, times = piece.finish.reason.value, piece.finish.times
                    if times is not None and not piece.finish.stop_match:
                        self._fastest.learn(answer.num_tokens - 1, times.total_s - times.first_token_s)
                    # A stop string: the engine need not go on while the last message is sent.
                    await deltas.aclose()
                    total_s = time.perf_counter() - accepted.arrived_s
                    end = End(
                        finish=piece.finish,
                        prompt_tokens=len(request.prompt_token_ids),
                        completion_tokens=answer.num_tokens,
                        first_token_s=first_token_s or total_s,
                        total_s=total_s,
                    )
                    yield piece, end
                    break
        except ServerError as error:
            outcome = error.code.lower()
            raise
        except Exception:
            outcome = InternalError.code.lower()
            raise
        finally:
            # A caller that is gone closes this generator, or cancels the task that runs it.
            if outcome is None:
                outcome = why_left()
            span.end(Generated(outcome, answer.num_tokens, times or so_far, first_token_s))
            total_s = time.perf_counter() - accepted.arrived_s
            self._metrics.observe_request(
                request,
                outcome=outcome,
                completion_tokens=answer.num_tokens,
                seconds=total_s,
                seconds_after_first_token=total_s - (first_token_s or total_s),
                times=times,
            )

    def _refuse_in_vain(
        self, request: Request, stops: Collection[str], remaining_s: float | None, arrived_s: float
    ) -> None:
        if remaining_s is None:
            return
        remaining_s -= time.perf_counter() - arrived_s
        tokens, guesses = certain_tokens(request, stops), request.speculative_tokens
        if guesses is None:
            guesses = self.backend.limits.speculative_tokens
        # At best every guess is right, which the fastest answer may not have seen.
        least_s = self._fastest.least_s(tokens) / (1 + guesses)
        if remaining_s < least_s:
            raise DeadlineExceededError(
                f"{tokens} tokens take {least_s:.2g} s at least, and the deadline is in {remaining_s:.2g} s",
                reason=Reason.DEADLINE_TOO_SHORT,
            )

    def _engine_id(self) -> str:
        # A caller may send one id many times; the engine needs each to be another.
        return f"{log.request_id.get()}#{next(self._serial)}"

    def _requests(self, first: Request, count: int) -> list[Request]:
        """`first`, and others that differ in the seed. They share one computation of the prompt, which the
        first has scored, if any.
        """
        if count == 1:
            return [first]
        requests = [msgspec.structs.replace(first, group=first.request_id)]
        for index in range(1, count):
            seed = (first.sampling.seed + index) & _MAX_SEED
            sampling = msgspec.structs.replace(first.sampling, seed=seed, prompt_logprobs=None)
            requests.append(
                msgspec.structs.replace(requests[0], request_id=self._engine_id(), sampling=sampling)
            )
        return requests


async def _bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word as they stand at the beginning of a text, and after a space."""
    found = {
        await tokenizer.encode(text, special=False) for word in words for text in (word, f" {word.strip()}")
    }
    return tuple(sorted(tokens for tokens in found if tokens))


async def _tokenise(
    backend: Backend, tokenizer: Tokenizer, message: generation_pb2.GenerateRequest
) -> Prompt:
    """The prompt's tokens, and its text, "" where it came as tokens."""
    match message.WhichOneof("prompt"):
        case "text":
            return Prompt(message.text, await tokenizer.encode(message.text))
        case "chat":
            messages = [
                {"role": said.role, "content": said.content, **({"name": said.name} if said.name else {})}
                for said in message.chat.messages
            ]
            adapters = [use.adapter for use in message.adapters]
            text = await backend.chat.prompt(messages, adapters, tokenizer.special_tokens)
            return Prompt(text, await tokenizer.encode(text, special=False))
        case _:
            return Prompt("", tuple(message.token_ids.ids))


def _echo(tokenizer: Tokenizer, prompt: Prompt) -> Prompt:
    known = [token_id for token_id in prompt.token_ids if tokenizer.has_text(token_id)]
    return Prompt(prompt.text or tokenizer.decode(known), prompt.token_ids)
