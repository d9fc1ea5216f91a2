"""From accepted requests to the pieces of their answers, the same for every transport."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

import msgspec

from loraplex_server.api.answers import timings
from loraplex_server.api.answers.answer import Answer, End, Finish, Piece
from loraplex_server.api.answers.merging import merged
from loraplex_server.api.answers.whole import WholeAnswer
from loraplex_server.api.lifecycle import Lifecycle
from loraplex_server.api.requests.deadlines import FastestAnswer
from loraplex_server.api.requests.intake import Accepted
from loraplex_server.api.telemetry.metrics import Metrics
from loraplex_server.api.telemetry.tracing.spans import Generated, Tracing
from loraplex_server.core import log
from loraplex_server.core.errors import InternalError, ServerError
from loraplex_server.core.request import Request
from loraplex_server.wire.messages import Times, TokenDelta

WhyLeft = Callable[[], str]
"""Names the outcome of an answer whose client did not stay to the end, for the metrics."""


class Output(NamedTuple):
    """A piece of one answer, by its number from 0; an answer's last piece comes with its end."""

    answer: int
    piece: Piece
    end: End | None


class Generator:
    """Runs requests on the engine."""

    def __init__(
        self, lifecycle: Lifecycle, metrics: Metrics, tracing: Tracing, fastest: FastestAnswer
    ) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tracing = tracing
        self._fastest = fastest

    def run(self, accepted: Sequence[Accepted], why_left: WhyLeft) -> AsyncGenerator[Output]:
        """The pieces of all answers as they come; answers are numbered in the order of their requests.

        Leaving early ends the requests in the engine; the first error of one ends all.

        Raises:
            ServerError: any of its kinds, as the engine gave it.
        """
        every = [(each, request) for each in accepted for request in each.requests]
        answers = [self._answer(index, *pair, why_left) for index, pair in enumerate(every)]
        return answers[0] if len(answers) == 1 else merged(answers)

    async def whole(self, accepted: Sequence[Accepted], why_left: WhyLeft) -> list[WholeAnswer]:
        """All answers when they have ended, in the order of their requests.

        Raises:
            ServerError: as `run`.
        """
        answers = [WholeAnswer() for each in accepted for _ in each.requests]
        async with contextlib.aclosing(self.run(accepted, why_left)) as outputs:
            async for index, piece, end in outputs:
                answers[index].add(piece, end)
        return answers

    async def _answer(
        self, index: int, accepted: Accepted, request: Request, why_left: WhyLeft
    ) -> AsyncGenerator[Output]:
        engine = self._lifecycle.backend.engine
        running = _Running(accepted, request, self._metrics, self._tracing)
        deltas = engine.stream(request)
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    piece = running.push(delta)
                    if piece.empty:
                        continue
                    if piece.finish is None:
                        yield Output(index, piece, None)
                        continue
                    end = running.finish(piece.finish, self._fastest)
                    # A stop string: the engine need not go on while the last message is sent.
                    await deltas.aclose()
                    yield Output(index, piece, end)
                    break
        except ServerError as error:
            running.outcome = error.code.lower()
            raise
        except Exception:
            running.outcome = InternalError.code.lower()
            raise
        finally:
            # A client that is gone closes this generator, or cancels the task that runs it.
            running.close(why_left)


class _Running:
    """One answer under way, with all that metrics and traces are told of it.

    Attributes:
        outcome: "stop", "length" or an error's code in lower case; None while nothing of these is known.
    """

    def __init__(self, accepted: Accepted, request: Request, metrics: Metrics, tracing: Tracing) -> None:
        self.outcome: str | None = None
        self._request = request
        self._arrived_s = accepted.arrived_s
        self._echo = accepted.echo
        self._metrics = metrics
        self._answer = Answer(
            accepted.tokenizer,
            request.prompt_token_ids,
            accepted.stops,
            include_stop=accepted.include_stop,
        )
        self._first_token_s: float | None = None
        # As of the first token, and the engine's last.
        self._so_far: Times | None = None
        self._times: Times | None = None
        self._span = tracing.generation(
            request, chat=accepted.chat, request_id=log.request_id.get(), seconds=self._seconds()
        )

    def push(self, delta: TokenDelta) -> Piece:
        """Takes new tokens in; the first piece brings the prompt where it is to be echoed."""
        if delta.token_ids and self._first_token_s is None:
            self._first_token_s, self._so_far = self._seconds(), delta.times
            self._metrics.observe_first_token(self._first_token_s)
        piece = self._answer.push(delta)
        if self._echo is not None and not piece.empty:
            piece, self._echo = msgspec.structs.replace(piece, prompt=self._echo), None
        return piece

    def finish(self, finish: Finish, fastest: FastestAnswer) -> End:
        """Takes the end in, which teaches `fastest` how long a token takes."""
        self.outcome, self._times = finish.reason.value, finish.times
        if finish.times is not None and not finish.stop_match:
            fastest.learn(self._answer.num_tokens - 1, finish.times.total_s - finish.times.first_token_s)
        total_s = self._seconds()
        end = End(
            finish=finish,
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._answer.num_tokens,
            first_token_s=self._first_token_s or total_s,
            total_s=total_s,
        )
        timings.note(end)
        return end

    def close(self, why_left: WhyLeft) -> None:
        """Tells metrics and traces how the answer went."""
        outcome = self.outcome or why_left()
        num_tokens = self._answer.num_tokens
        self._span.end(Generated(outcome, num_tokens, self._times or self._so_far, self._first_token_s))
        total_s = self._seconds()
        self._metrics.observe_request(
            self._request,
            outcome=outcome,
            completion_tokens=num_tokens,
            seconds=total_s,
            seconds_after_first_token=total_s - (self._first_token_s or total_s),
            times=self._times,
        )

    def _seconds(self) -> float:
        """Seconds since the arrival."""
        return time.perf_counter() - self._arrived_s
